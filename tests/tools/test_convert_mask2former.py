"""A converted official Mask2Former checkpoint reproduces the reference's outputs."""

import pickle

import pytest
import torch
from torch import nn

from hiervl.checkpoint import AtomicCheckpointer
from tests.conftest import shared_file
from tests.test_parity import TOLERANCE, build_decoder, build_pixel_decoder
from tools import convert_mask2former as tool


@pytest.fixture(scope="module")
def reference():
    return torch.load(shared_file("parity/mask2former.pt"), weights_only=True)


def official(reference, early=False):
    """The reference's weights under the names of an official checkpoint; `early`: those of the first releases."""
    head = "sem_seg_head." if early else "sem_seg_head.pixel_decoder."
    state = {"backbone.stem.conv1.weight": torch.zeros(4, 3, 7, 7), "criterion.empty_weight": torch.ones(6)}
    state.update({head + name: value for name, value in reference["pixel_decoder"].items()})
    state.update({"sem_seg_head.predictor." + name: value for name, value in reference["predictor"].items()})
    if early:
        state["sem_seg_head.predictor.static_query.weight"] = state.pop("sem_seg_head.predictor.query_feat.weight")
        state["sem_seg_head.predictor.level_embed"] = state.pop("sem_seg_head.predictor.level_embed.weight")
    return state


def write(path, state, early=False):
    if path.suffix == ".pkl":
        arrays = {name: value.numpy() for name, value in state.items()}
        content = pickle.dumps({"model": arrays, "__author__": "x"}, protocol=5 if early else 2)
        # As NumPy 1 wrote it. Protocol 2 stores no string lengths, so the shorter module name is still valid.
        path.write_bytes(content if early else content.replace(b"numpy._core", b"numpy.core"))
    else:
        torch.save({"model": state, "iteration": 5}, path)
    return str(path)


@pytest.mark.parametrize("suffix, early", [(".pkl", False), (".pth", False), (".pkl", True)])
def test_converted_network_reproduces_mask2former(tmp_path, reference, capsys, suffix, early):
    source, target = write(tmp_path / f"official{suffix}", official(reference, early), early), str(tmp_path / "out.pth")
    assert tool.main([source, target, "--keep-classifier"]) == 0
    state = torch.load(target, weights_only=True)["model"]
    assert torch.equal(state.pop("backbone.stem.conv1.weight"), torch.zeros(4, 3, 7, 7))
    network = nn.ModuleDict(
        {"pixel_decoder": build_pixel_decoder(reference["settings"]), "decoder": build_decoder(reference["settings"])}
    )
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        memory, mask_features = network["pixel_decoder"](reference["features"])
        last = network["decoder"](memory, mask_features, None)[-1]
    torch.testing.assert_close(last.class_logits, reference["pred_logits"], **TOLERANCE)
    torch.testing.assert_close(last.mask_logits(mask_features), reference["pred_masks"], **TOLERANCE)
    out = capsys.readouterr().out
    assert "121 weights (backbone 1, pixel_decoder 53, decoder 67)" in out
    assert "left out, no counterpart in HierVL: 1 (criterion.empty_weight)" in out


def test_class_head_is_left_out_by_default(tmp_path, reference, capsys):
    source, target = write(tmp_path / "official.pkl", official(reference)), str(tmp_path / "out.pth")
    assert tool.main([source, target]) == 0
    assert not [name for name in torch.load(target, weights_only=True)["model"] if "class_embed" in name]
    assert "left out, class head: 2 (decoder.class_embed.weight, decoder.class_embed.bias)" in capsys.readouterr().out


CONFIG = "configs/shapes_supervised.yaml"
SMALL = [
    "MODEL.HSQG.ENABLED",
    False,
    "MODEL.CMSAM.ENABLED",
    False,
    "MODEL.DECODER.SEMANTIC",
    False,
    "MODEL.CRITERION.SEMANTIC_MATCHING",
    "fixed",
    "MODEL.BACKBONE.NAME",
    "TimmBackbone",
    "MODEL.BACKBONE.TIMM.NAME",
    "lcnet_050",
    "MODEL.PIXEL_DECODER.CONV_DIM",
    "64",
    "MODEL.PIXEL_DECODER.MASK_DIM",
    "64",
    "MODEL.PIXEL_DECODER.ENC_LAYERS",
    "2",
    "MODEL.PIXEL_DECODER.FEEDFORWARD_DIM",
    "128",
    "MODEL.DECODER.HIDDEN_DIM",
    "64",
    "MODEL.DECODER.NUM_LAYERS",
    "3",
    "MODEL.DECODER.FEEDFORWARD_DIM",
    "128",
    "MODEL.DECODER.NUM_QUERIES",
    "9",
]


@pytest.mark.parametrize("classifier", ["text", "linear"])
def test_mismatched_weights_are_listed_and_the_rest_loads(tmp_path, reference, capsys, classifier):
    source, target = write(tmp_path / "official.pkl", official(reference)), str(tmp_path / "out.pth")
    overrides = [*SMALL, "MODEL.DECODER.CLASSIFIER", classifier]
    assert tool.main([source, target, "--config-file", CONFIG, "--opts", *overrides]) == 0
    out = capsys.readouterr().out
    mismatched = 6 if classifier == "text" else 8  # four projections of backbone maps, two of queries; class head
    assert f"different shape in this config's network: {mismatched} (pixel_decoder.input_proj.0.0.weight (64, 48" in out
    assert "not in this config's network: 1 (backbone.stem.conv1.weight)" in out
    assert ("class head: 2" in out) == (classifier == "text")
    assert "initialized from scratch:" in out
    args = tool.parse_args([source, target, "--config-file", CONFIG, "--opts", *overrides])
    network, _ = tool.build_network(args)
    AtomicCheckpointer(network).load(target)
    name = "transformer_ffn_layers.2.linear1.weight"
    assert torch.equal(network.state_dict()[f"decoder.{name}"], reference["predictor"][name])


def test_config_with_different_sizes_is_refused(tmp_path, reference, capsys):
    source = write(tmp_path / "official.pkl", official(reference))
    small = [
        *SMALL,
        "MODEL.PIXEL_DECODER.CONV_DIM",
        "32",
        "MODEL.PIXEL_DECODER.MASK_DIM",
        "32",
        "MODEL.DECODER.HIDDEN_DIM",
        "32",
        "MODEL.PIXEL_DECODER.FEEDFORWARD_DIM",
        "96",
        "MODEL.DECODER.FEEDFORWARD_DIM",
        "96",
    ]
    assert tool.main([source, str(tmp_path / "out.pth"), "--config-file", CONFIG, "--opts", *small]) == 2
    assert "neither the pixel decoder nor the decoder fits" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


class ExecutesCode:
    def __reduce__(self):
        return print, ("executed",)


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, state: None, "no such"),
        (lambda path, state: path.write_bytes(b"hello"), "not a pickled checkpoint"),
        (lambda path, state: path.write_bytes(b""), "not a pickled checkpoint"),
        (lambda path, state: path.write_bytes(pickle.dumps({"model": ExecutesCode()})), "it holds builtins.print"),
        (lambda path, state: path.write_bytes(pickle.dumps({"model": {}})), "holds no weights"),
        (lambda path, state: path.write_bytes(pickle.dumps([1])), "holds no weights"),
        (lambda path, state: write(path, without(state, "cross_attention")), "it has no masked-attention decoder"),
        (
            lambda path, state: write(path, without(state, "sampling_offsets")),
            "it has no deformable-attention pixel decoder",
        ),
        (
            lambda path, state: write(path, {"decoder.query_feat.weight": state["criterion.empty_weight"]}),
            "already uses HierVL's names",
        ),
    ],
)
def test_invalid_files_are_refused_in_one_line(tmp_path, reference, capsys, make, message):
    path = tmp_path / "official.pkl"
    make(path, official(reference))
    assert tool.main([str(path), str(tmp_path / "out.pth")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and str(path) in captured.err and message in captured.err
    assert "executed" not in captured.out and not (tmp_path / "out.pth").exists()
