"""The command line: a user's mistake ends in one line that names the file or key and the way out."""

import pytest
from detectron2.data import MetadataCatalog

import train_net
from hiervl.data.shapes import generate

TINY = [
    "MODEL.DEVICE",
    "cpu",
    "MODEL.BACKBONE.TIMM.NAME",
    "lcnet_050",
    "MODEL.PIXEL_DECODER.CONV_DIM",
    "32",
    "MODEL.PIXEL_DECODER.MASK_DIM",
    "32",
    "MODEL.DECODER.HIDDEN_DIM",
    "32",
    "MODEL.DECODER.NUM_QUERIES",
    "20",
    "MODEL.CRITERION.NUM_POINTS",
    "128",
    "DATASETS.SPLIT",
    "shapes/splits/seed0/4",
    "INPUT.CROP_SIZE",
    "(64, 64)",
    "SOLVER.IMS_PER_BATCH",
    "2",
    "SOLVER.MAX_ITER",
    "2",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
    "SOLVER.LOG_PERIOD",
    "1",
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate(str(tmp_path / "shapes"), num_train=8, num_val=2, size=64, seed=0, labeled=(4,))
    return tmp_path / "shapes"


def call(root, *overrides, flags=()):
    output = ["OUTPUT_DIR", str(root.parent / "run")]
    return train_net.main(
        train_net.parser().parse_args(
            ["--config-file", "configs/shapes_supervised.yaml", *flags, *TINY, *output, *overrides]
        )
    )


def mistake(capsys, root, *overrides, flags=()):
    with pytest.raises(SystemExit) as exit_:
        call(root, *overrides, flags=flags)
    assert exit_.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_train_resume_and_evaluate(root):
    results = call(root)
    assert results["last"]["iteration"] == 2
    assert call(root, "SOLVER.MAX_ITER", "3", flags=["--resume"])["last"]["iteration"] == 3
    run = root.parent / "run"
    record = (run / "results.json").read_bytes()
    metrics = call(root, flags=["--eval-only"])
    assert set(metrics["shapes_val"]) == {"student", "teacher"} and metrics["iteration"] == 3
    report = (run / "inference/shapes_val/teacher/segmentation.json").read_bytes()
    names = MetadataCatalog.get("shapes_val").stuff_classes
    swapped = call(root, flags=["--eval-only", "--classes", ", ".join(names[1:] + names[:1])])
    assert set(swapped["shapes_val"]) == {"student", "teacher"}
    assert (run / "inference/shapes_val/teacher/segmentation.json").read_bytes() == report
    assert (run / "inference_other_words/shapes_val/teacher/segmentation.json").is_file()
    assert (run / "results.json").read_bytes() == record  # the run's, not that of whoever looks again


def test_classes_that_do_not_fit(capsys, root):
    call(root)
    assert "--classes: 2 names for the 25 classes" in mistake(capsys, root, flags=["--eval-only", "--classes", "a,b"])
    names = MetadataCatalog.get("shapes_val").stuff_classes
    given = ",".join(["unheard of", *names[1:]])
    assert "unheard of" in mistake(capsys, root, flags=["--eval-only", "--classes", given])


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (("SOLVER.MAXITER", "5"), "SOLVER.MAXITER; did you mean SOLVER.MAX_ITER"),
        (("DATASETS.SPLIT", "shapes/splits/seed9/4"), "seed9"),
        (("DATASETS.TRAIN", "('shaqes_train',)"), "shaqes_train"),
        (("MODEL.TEXT.EMBEDDINGS", "none.npz"), "none.npz: no such embeddings file"),
        (("MODEL.BACKBONE.WEIGHTS", "none.pth"), "none.pth: no such weights file (MODEL.BACKBONE.WEIGHTS)"),
        (("MODEL.WEIGHTS", "none.pth"), "none.pth: no such checkpoint"),
        (("SEMI.FILTERS", "('sure',)"), "SEMI.FILTERS: no filter called 'sure'"),
        (("MODEL.DECODER.CLASSIFIER", "cosine"), "MODEL.DECODER.CLASSIFIER: 'cosine'"),
        (("TEST.MODE", "tiles"), "TEST.MODE: 'tiles'"),
        (("MODEL.CRITERION.SEGMENTS", "blobs"), "MODEL.CRITERION.SEGMENTS: 'blobs'"),
        (("MODEL.CRITERION.SEMANTIC_MATCHING", "free"), "MODEL.CRITERION.SEMANTIC_MATCHING: 'free'"),
        (
            ("MODEL.CRITERION.SEMANTIC_MATCHING", "hungarian", "MODEL.CRITERION.SEGMENTS", "class_regions"),
            "MODEL.CRITERION.SEGMENTS to components",
        ),
        (
            (
                "MODEL.CRITERION.SEMANTIC_MATCHING",
                "hungarian",
                "MODEL.CRITERION.SEGMENTS",
                "components",
                "MODEL.DECODER.SEMANTIC",
                "False",
            ),
            "MODEL.DECODER.SEMANTIC is False",
        ),
        (("MODEL.CRITERION.IMPORTANCE_RATIO", "1.5"), "MODEL.CRITERION.IMPORTANCE_RATIO is 1.5"),
        (("SEMI.FEATURE_DROPOUT", "1.0"), "SEMI.FEATURE_DROPOUT is 1.0"),
        (("MODEL.TEXT.ABLATION", "random", "MODEL.DECODER.CLASSIFIER", "linear"), "MODEL.TEXT.ABLATION"),
        (("MODEL.TEXT.ABLATION", "random", "MODEL.TEXT.CONTEXT_TOKENS", "2"), "MODEL.TEXT.ABLATION"),
    ],
)
def test_wrong_config(capsys, root, overrides, expected):
    assert expected in mistake(capsys, root, *overrides)


def test_missing_data_root(capsys, root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "nowhere"))
    assert "DETECTRON2_DATASETS" in mistake(capsys, root)


def test_evaluation_without_a_checkpoint(capsys, root):
    assert "holds no checkpoint" in mistake(capsys, root, flags=["--eval-only"])


def test_an_image_without_its_mask(capsys, root):
    (root / "masks" / "train" / (root / "splits/seed0/4/labeled.txt").read_text().split()[1].split("/")[-1]).unlink()
    assert "masks/train" in mistake(capsys, root)


def test_weights_of_another_shape(capsys, root):
    call(root)
    message = mistake(
        capsys, root, "MODEL.WEIGHTS", str(root.parent / "run" / "model_final.pth"), "MODEL.DECODER.NUM_QUERIES", "7"
    )
    assert "model_final.pth" in message and "query_feat.weight has shape (20, 32)" in message
