"""A training run with CLIP's text and image towers: which weights are trained, saved and restored."""

import torch

from hiervl.semi.trainer import SemiSupervisedTrainer
from tests.semi.conftest import make_cfg, shapes_root  # noqa: F401  (fixtures)


def test_context_adapter_and_image_tower_train_and_resume(make_cfg, tower_model, tmp_path):  # noqa: F811
    def make_trainer(iterations):
        return SemiSupervisedTrainer(
            make_cfg(
                "MODEL.TEXT.EMBEDDINGS",
                "",
                "MODEL.TEXT.MODEL",
                tower_model,
                "MODEL.TEXT.CACHE",
                str(tmp_path / "cache"),
                "MODEL.TEXT.CONTEXT_TOKENS",
                4,
                "MODEL.TEXT.ADAPTER",
                True,
                "MODEL.BACKBONE.NAME",
                "CLIPBackbone",
                "MODEL.BACKBONE.CLIP.MODEL",
                tower_model,
                "MODEL.BACKBONE.ATTENTION_ONLY",
                True,
                "SOLVER.MAX_ITER",
                iterations,
                "SOLVER.CHECKPOINT_PERIOD",
                2,
                "SEMI.BURN_IN",
                1,
                "TEST.EVAL_PERIOD",
                0,
            )
        )

    first = make_trainer(2)
    before = {name: value.clone() for name, value in first.student.state_dict().items()}
    first.train()
    after = first.student.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {"text.context_embed.weight", "text.adapter.gamma", "text.adapter.out.weight"} <= changed
    assert "text.mean" not in changed
    tower = {name for name in after if name.startswith("backbone.tower.")}
    assert tower & changed == {name for name in tower if ".attn." in name}
    assert any(name.startswith("backbone.pyramid.") for name in changed)
    second = make_trainer(4)  # more than 1 extra iteration: at the end of the first schedule the learning rate is 0
    second.resume_or_load(resume=True)
    assert all(torch.equal(value, after[name]) for name, value in second.student.state_dict().items())
    second.train()
    assert not torch.equal(second.student.text.context_embed.weight, after["text.context_embed.weight"])
