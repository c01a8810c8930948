"""Pseudo-labels: the teacher reads the weak views, the filters weigh what it says, and the student's unlabeled
batch is made of it (strong views after CutMix, and the weak view under feature dropout)."""

import torch
from detectron2.engine import HookBase

from .filters import FilterChain, PseudoLabels


def paste(box, own, other):
    """CutMix (arXiv 1906.01916): `own` (..., H, W) with the box (top, left, bottom, right) of `other` pasted in."""
    top, left, bottom, right = box
    mixed = own.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed


class PseudoLabelHook(HookBase):
    """Turns `trainer.batch["unlabeled"]` into training inputs of the student, `trainer.pseudo_inputs`.

    Args:
        filters: the chain. burn_in: iteration at which the teacher starts to teach.
        feature_dropout: channel dropout of the extra stream on the weak view; 0 for no such stream.
        absent_below: a class is known to be absent from an image if its probability is below this everywhere.
    """

    def __init__(self, filters: FilterChain, *, burn_in: int, feature_dropout: float, absent_below: float):
        self.filters = filters
        self.burn_in = burn_in
        self.feature_dropout = feature_dropout
        self.absent_below = absent_below

    @classmethod
    def from_config(cls, cfg):
        return cls(
            FilterChain.from_config(cfg),
            burn_in=cfg.SEMI.BURN_IN,
            feature_dropout=cfg.SEMI.FEATURE_DROPOUT,
            absent_below=cfg.SEMI.ABSENCE_THRESHOLD,
        )

    def before_step(self):
        unlabeled = self.trainer.batch["unlabeled"]
        if not unlabeled or self.trainer.iter < self.burn_in:
            self.trainer.pseudo_inputs = []
            return
        pseudo = self.predict_pseudo_labels(unlabeled)
        weight, kept = self.filters(pseudo)
        self._log(unlabeled, pseudo, weight, kept)
        if self.trainer.unlabeled_weight() > 0:
            self.trainer.pseudo_inputs = self.student_inputs(unlabeled, pseudo, weight)
        else:
            self.trainer.pseudo_inputs = []

    @torch.no_grad()
    def predict_pseudo_labels(self, unlabeled) -> PseudoLabels:
        """The teacher's probabilities on the weak views."""
        teacher = self.trainer.teacher.model
        images = torch.stack([x["image"] for x in unlabeled]).to(teacher.device).float()
        valid = torch.stack([x["valid"] for x in unlabeled]).to(teacher.device)
        with self.trainer.autocast():
            prediction = teacher.predict(
                images, suppress=False, valid=valid if any(x["padded"] for x in unlabeled) else None
            )
        return PseudoLabels.from_probabilities(
            prediction.dense().float(),
            valid,
            teacher.class_names,
            relevance=prediction.relevance,
            considered=prediction.scatter_to_all_classes(
                torch.ones_like(prediction.index, dtype=torch.bool)[..., None, None]
            )[..., 0, 0],
            pixel_text=None
            if prediction.pixel_text is None
            else prediction.scatter_to_all_classes(prediction.pixel_text.float(), fill=-1.0),
        )

    def student_inputs(self, unlabeled, pseudo, weight):
        """One input per stream and sample (images that are there only as CutMix partners excepted)."""
        not_excluded = self.not_excluded(pseudo)
        label = [
            {
                "sem_seg": pseudo.labels[i],
                "weight": weight[i],
                "valid": pseudo.valid[i],
                "padded": sample["padded"],
                "unknown": not_excluded[i],
            }
            for i, sample in enumerate(unlabeled)
        ]
        inputs = []
        for i, sample in enumerate(unlabeled):
            if sample.get("extra"):
                continue
            for view, (image, box) in enumerate(zip(sample["strong"], sample["cutmix_box"])):
                j = sample["partner"]
                if box is None:
                    inputs.append(_input(image, label[i]) | self._teacher_targets(pseudo, i))
                else:
                    mixed = {k: paste(box, label[i][k], label[j][k]) for k in ("sem_seg", "weight", "valid")}
                    mixed |= {k: label[i][k] | label[j][k] for k in ("unknown", "padded")}
                    inputs.append(
                        _input(paste(box, image, unlabeled[j]["strong"][view]), mixed)
                        | self._teacher_targets(pseudo, i, j, box)
                    )
            if self.feature_dropout > 0:
                inputs.append(
                    _input(sample["image"], label[i])
                    | self._teacher_targets(pseudo, i)
                    | {"feature_dropout": self.feature_dropout}
                )
        return inputs

    def not_excluded(self, pseudo) -> torch.Tensor:
        """(B, K) bool: classes that the teacher does not exclude. One that it did not even look at (its relevance was
        not among the highest) is not excluded."""
        highest = pseudo.probabilities.masked_fill(~pseudo.valid[:, None], 0).flatten(2).amax(2)
        not_excluded = highest >= self.absent_below
        return not_excluded if pseudo.considered is None else not_excluded | ~pseudo.considered

    @staticmethod
    def _teacher_targets(pseudo, i, j=None, box=None):
        """What the student's view i (with a box of j pasted in) is compared with; see regularizers.LossContext."""
        if pseudo.pixel_text is None:
            return {}
        own = {"pixel_text": pseudo.pixel_text[i], "valid": pseudo.valid[i]}
        if box is not None:
            quarter = [round(edge / 4) for edge in box]  # pixel-text scores have stride 4
            own = {
                "pixel_text": paste(quarter, own["pixel_text"], pseudo.pixel_text[j]),
                "valid": paste(box, own["valid"], pseudo.valid[j]),
            }
        return {
            "teacher": own
            | {"relevance": pseudo.relevance[i], "mixed": torch.tensor(box is not None, device=pseudo.valid.device)}
        }

    @torch.no_grad()
    def _log(self, unlabeled, pseudo, weight, kept):
        """Kept shares per filter and class, and where masks are there to measure with, accuracy."""
        trainer = self.trainer
        if not trainer.should_log():
            return
        trainer.log.update({f"kept/{name}": share for name, share in kept.items()})
        counts = _per_class(pseudo.labels, pseudo.valid.to(weight), pseudo.class_names)
        shares = _per_class(pseudo.labels, weight, pseudo.class_names) / counts.clamp(min=1)
        trainer.log.update({f"kept_class/{pseudo.class_names[k]}": shares[k] for k in counts.nonzero()[:, 0].tolist()})
        measured = [i for i, x in enumerate(unlabeled) if "true_sem_seg" in x]
        if measured:
            truth = torch.stack([unlabeled[i]["true_sem_seg"] for i in measured]).to(weight.device)
            known = (truth < len(pseudo.class_names)) & pseudo.valid[measured]
            right = (pseudo.labels[measured] == truth) & known
            trainer.log["pseudo_accuracy/all"] = right.sum() / known.sum().clamp(min=1)
            trainer.log["pseudo_accuracy/kept"] = (right * weight[measured]).sum() / (
                known * weight[measured]
            ).sum().clamp(min=1e-6)

    def state_dict(self):
        return self.filters.state_dict()

    def load_state_dict(self, state):
        self.filters.load_state_dict(state)


def _input(image, label):
    """A training input whose losses count by its kept share of the non-padding pixels."""
    share = label["weight"].sum() / label["valid"].sum().clamp(min=1)
    return {
        "image": image,
        "sem_seg": label["sem_seg"],
        "weight": label["weight"],
        "unknown": label["unknown"],
        "valid": label["valid"],
        "padded": label["padded"],
        "image_weight": share,
        "pseudo": True,
    }


def _per_class(labels, weight, class_names):
    """Sum of weight per label: (K,)."""
    return torch.bincount(labels.flatten(), weights=weight.flatten(), minlength=len(class_names))
