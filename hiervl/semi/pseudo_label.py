"""Pseudo-labels: the EMA teacher labels the weak views, filters weigh its labels, and the student gets training inputs.

The student's inputs are the strong views after CutMix, and the weak view with feature dropout.
"""

import torch
from detectron2.engine import HookBase

from ..losses.regularizers import TeacherView
from ..utils.transfer import stack_on_device
from .exchange import with_remote_partners
from .filters import FilterChain, PseudoLabels


def paste(box, target, source):
    """CutMix (arXiv 1906.01916): a copy of `target` (..., H, W) with a box of `source` pasted in.

    box: (top, left, bottom, right), pixels, ends exclusive.
    """
    top, left, bottom, right = box
    mixed = target.clone()
    mixed[..., top:bottom, left:right] = source[..., top:bottom, left:right]
    return mixed


def split_evenly(items: list, parts: int) -> list:
    """Split a list into `parts` lists of nearly equal size, or into lists of one item if there are fewer items."""
    parts = min(parts, len(items))
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[start:end] for start, end in zip(edges, edges[1:])]


class PseudoLabelHook(HookBase):
    """Turns `trainer.batch["unlabeled"]` into training inputs of the student, `trainer.pseudo_inputs`.

    Args:
        filters: the chain. burn_in: iteration at which the teacher starts to teach.
        feature_dropout: channel dropout of the extra stream on the weak view; 0 for no such stream.
        absence_threshold: a class is known to be absent from an image if its probability is below it everywhere.
    """

    def __init__(self, filters: FilterChain, *, burn_in: int, feature_dropout: float, absence_threshold: float):
        self.filters = filters
        self.burn_in = burn_in
        self.feature_dropout = feature_dropout
        self.absence_threshold = absence_threshold

    @classmethod
    def from_config(cls, cfg):
        return cls(
            FilterChain.from_config(cfg),
            burn_in=cfg.SEMI.BURN_IN,
            feature_dropout=cfg.SEMI.FEATURE_DROPOUT,
            absence_threshold=cfg.SEMI.ABSENCE_THRESHOLD,
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
            self.trainer.pseudo_inputs = self.student_inputs(*with_remote_partners(unlabeled, pseudo, weight))
        else:
            self.trainer.pseudo_inputs = []

    @torch.no_grad()
    def predict_pseudo_labels(self, unlabeled) -> PseudoLabels:
        """The teacher's pseudo-labels of the weak views, with everything that filters may read."""
        padded = any(x["padded"] for x in unlabeled)
        parts = split_evenly(unlabeled, self.trainer.accumulate)
        return PseudoLabels.concatenate([self._predict_part(part, padded) for part in parts])

    def _predict_part(self, unlabeled, padded) -> PseudoLabels:
        teacher = self.trainer.teacher.model
        images = stack_on_device([x["image"] for x in unlabeled], teacher.device).float()
        valid = stack_on_device([x["valid"] for x in unlabeled], teacher.device)
        with self.trainer.precision.autocast():
            prediction = teacher.predict(images, suppress=False, valid=valid if padded else None)
        return PseudoLabels.from_probabilities(
            prediction.values.float(),
            valid,
            teacher.class_names,
            prediction.index,
            relevance=prediction.relevance,
            pixel_text=None if prediction.pixel_text is None else prediction.pixel_text.float(),
        )

    def student_inputs(self, unlabeled, pseudo, weight):
        """Training inputs: one per stream and sample, except for samples that serve only as CutMix partners."""
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
                    views = (x.to(weight.device, non_blocking=True) for x in (image, unlabeled[j]["strong"][view]))
                    mixed = {k: paste(box, label[i][k], label[j][k]) for k in ("sem_seg", "weight", "valid")}
                    mixed |= {k: label[i][k] | label[j][k] for k in ("unknown", "padded")}
                    inputs.append(_input(paste(box, *views), mixed) | self._teacher_targets(pseudo, i, j, box))
            if self.feature_dropout > 0:
                inputs.append(
                    _input(sample["image"], label[i])
                    | self._teacher_targets(pseudo, i)
                    | {"feature_dropout": self.feature_dropout}
                )
        return inputs

    def not_excluded(self, pseudo) -> torch.Tensor:
        """(B, K) bool, classes that may be in the image.

        The teacher excludes a class if its probability is below the threshold everywhere. A class that HSQG did not
        select has no probabilities, and is therefore not excluded.
        """
        shape = len(pseudo.index), len(pseudo.class_names)
        not_excluded = torch.ones(shape, dtype=torch.bool, device=pseudo.index.device)
        return not_excluded.scatter(1, pseudo.index, pseudo.highest >= self.absence_threshold)

    @staticmethod
    def _teacher_targets(pseudo, i, j=None, box=None):
        """The teacher's view for input i, with a box of input j pasted in; see losses.regularizers.TeacherView."""
        if pseudo.pixel_text is None:
            return {}
        pixel_text, index, valid = pseudo.pixel_text[i], pseudo.index[i], pseudo.valid[i]
        if box is not None:
            quarter = [round(edge / 4) for edge in box]  # the pixel-text similarity has stride 4
            unknown = torch.full_like(pixel_text, -1.0)
            # The two images may have different classes: each keeps its own maps, known on its side of the box's edge.
            outside, inside = paste(quarter, pixel_text, unknown), paste(quarter, unknown, pseudo.pixel_text[j])
            pixel_text, index = torch.cat((outside, inside)), torch.cat((index, pseudo.index[j]))
            valid = paste(box, valid, pseudo.valid[j])
        return {"teacher": TeacherView(pixel_text, index, valid, pseudo.relevance[i], mixed=box is not None)}

    @torch.no_grad()
    def _log(self, unlabeled, pseudo, weight, kept):
        """Log kept shares per filter and class, and the accuracy of pseudo-labels where true masks are available."""
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
            correct = (pseudo.labels[measured] == truth) & known
            trainer.log["pseudo_accuracy/all"] = correct.sum() / known.sum().clamp(min=1)
            trainer.log["pseudo_accuracy/kept"] = (correct * weight[measured]).sum() / (
                known * weight[measured]
            ).sum().clamp(min=1e-6)

    def state_dict(self):
        return self.filters.state_dict()

    def load_state_dict(self, state):
        self.filters.load_state_dict(state)


def _input(image, label):
    """A training input whose losses are weighted by its kept share of the pixels that are not padding."""
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
