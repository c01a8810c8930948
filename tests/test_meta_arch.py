"""The network as a whole: lists of dicts in and out, any image size, any list of classes."""
import pytest
import torch
import torch.nn.functional as F

from hiervl.backbones import TimmBackbone
from hiervl.classifier import LinearClassifier, TextClassifier
from hiervl.criterion import Criterion
from hiervl.dual_query_decoder import QueryDecoder
from hiervl.matcher import HungarianMatcher
from hiervl.meta_arch import HierVL
from hiervl.pixel_decoder import PixelDecoder
from hiervl.text import ClassText

DIM = 32


def make_network(classes=4, classifier="text", embeddings=None, **changes):
    torch.manual_seed(0)
    backbone = TimmBackbone(name="lcnet_050")
    text = ClassText(torch.randn(classes, 16) if embeddings is None else embeddings) if classifier == "text" else None
    head = TextClassifier(DIM, 16) if classifier == "text" else LinearClassifier(DIM, classes)
    options = {"backbone": backbone, "text": text, "class_names": [f"class {k}" for k in range(classes)],
               "pixel_decoder": PixelDecoder(backbone.output_shape(), conv_dim=DIM, mask_dim=DIM, num_layers=1,
                                             num_heads=4, num_points=2, feedforward_dim=32),
               "decoder": QueryDecoder(memory_dim=DIM, mask_dim=DIM, hidden_dim=DIM, num_queries=6, num_heads=4,
                                       num_layers=3, feedforward_dim=32, classifier=head),
               "criterion": Criterion(matcher=HungarianMatcher(2.0, 5.0, 5.0), class_weight=2.0, mask_weight=5.0,
                                      dice_weight=5.0, pixel_weight=2.0, no_object_weight=0.1, num_points=100,
                                      oversample_ratio=3.0, importance_ratio=0.75, deep_supervision=True),
               "pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3, "size_divisibility": 32,
               "segments": "class_regions", "min_area": 4, "test_mode": "whole", "window": (64, 64),
               "stride": (48, 48), **changes}
    return HierVL(**options)


def training_input(size=64, classes=4, **extra):
    return {"image": torch.randint(0, 256, (3, size, size), dtype=torch.uint8),
            "sem_seg": torch.randint(0, classes, (size, size)), **extra}


def pseudo_input(classes=4, share=0.5):
    return training_input(weight=torch.ones(64, 64), pseudo=True, image_weight=torch.tensor(share),
                          unknown=torch.zeros(classes, dtype=torch.bool))


@pytest.mark.parametrize("classifier", ["text", "linear"])
@pytest.mark.parametrize("size", [(64, 64), (45, 71), (33, 128)])
def test_inference_gives_probabilities_at_the_wanted_size(classifier, size):
    network = make_network(classifier=classifier).eval()
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    plain, resized = network([{"image": image}, {"image": image, "height": 50, "width": 40}])
    assert plain["sem_seg"].shape == (4, *size) and resized["sem_seg"].shape == (4, 50, 40)
    total = plain["sem_seg"].sum(0)
    assert (plain["sem_seg"] >= 0).all() and (total > 0).all() and (total < 1).all()


def test_training_gives_losses_of_both_kinds_and_gradients_everywhere():
    network = make_network().train()
    losses = network([training_input(), pseudo_input(), training_input()])
    assert set(losses) == {f"loss_{u}{n}" for u in ("", "u_") for n in ("class", "mask", "dice", "pixel")}
    sum(losses.values()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None]
    assert not without


def test_only_labelled_or_only_pseudo_labelled_images():
    network = make_network().train()
    assert all(not name.startswith("loss_u_") for name in network([training_input()]))
    assert all(name.startswith("loss_u_") for name in network([pseudo_input()]))


def test_text_classifier_has_no_weight_with_a_class_dimension():
    few, many = make_network(classes=4), make_network(classes=9)
    assert {k: v.shape for k, v in few.state_dict().items()} == {k: v.shape for k, v in many.state_dict().items()}


def test_permuting_the_classes_permutes_the_output():
    embeddings, order = torch.randn(4, 16), torch.tensor([2, 0, 3, 1])
    first = make_network(embeddings=embeddings).eval()
    second = make_network(embeddings=embeddings[order]).eval()
    second.load_state_dict(first.state_dict())
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    torch.testing.assert_close(first(image)[0]["sem_seg"][order], second(image)[0]["sem_seg"])


def test_one_class_trains_and_predicts():
    network = make_network(classes=1)
    losses = network.train()([training_input(classes=1)])
    assert all(torch.isfinite(value) for value in losses.values())
    assert network.eval()([training_input()])[0]["sem_seg"].shape == (1, 64, 64)


def test_a_window_as_large_as_the_image_is_the_whole_image():
    image = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    whole = make_network().eval()(image)[0]["sem_seg"]
    sliding = make_network(test_mode="sliding", window=(64, 96)).eval()(image)[0]["sem_seg"]
    torch.testing.assert_close(whole, sliding)
    smaller = make_network(test_mode="sliding", window=(48, 64), stride=(32, 48)).eval()(image)[0]["sem_seg"]
    assert smaller.shape == whole.shape and torch.isfinite(smaller).all()


def test_evidence_is_what_mask2former_computes_at_full_size_up_to_interpolation():
    """Summing over queries before upsampling gives the labels of upsampling every query's mask first."""
    network = make_network().eval()
    images = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        own = network.predict(images).argmax(1)
        last = network.predict_queries(images)[-1]
        masks = F.interpolate(last["mask_logits"], size=(64, 64), mode="bilinear", align_corners=False).sigmoid()
        full = torch.einsum("bnk,bnhw->bkhw", last["class_logits"].softmax(-1)[..., :-1], masks).argmax(1)
    assert (own == full).float().mean() > 0.95


def test_feature_dropout_drops_whole_channels_of_its_image_only():
    network = make_network().train()
    seen = {}
    network.pixel_decoder.register_forward_pre_hook(lambda module, args: seen.update(args[0]))
    images = torch.rand(2, 3, 64, 64) * 255
    network.backbone.eval()
    network.predict_queries(images)
    plain = dict(seen)
    network.predict_queries(images, [0.0, 0.5])
    for name, value in seen.items():
        torch.testing.assert_close(value[0], plain[name][0])
        dropped = (value[1] == 0).flatten(1).all(1) & (plain[name][1] != 0).flatten(1).any(1)
        assert dropped.any() and not dropped.all()


def test_bfloat16_autocast_stays_close():
    network = make_network().eval()
    image = [{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}]
    full = network(image)[0]["sem_seg"]
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image)[0]["sem_seg"]
    assert torch.isfinite(half).all()
    assert (half.float() - full).abs().max() < 0.1
