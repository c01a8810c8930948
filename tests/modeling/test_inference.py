import torch

from hiervl.modeling.inference import ClassScoreHead, InferenceProtocol, sliding_window


def test_evidence_by_hand_and_its_normalization():
    scores = ClassScoreHead(epsilon=0.5)
    class_logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]]))  # (1, 2 queries, 2 classes + none)
    mask_logits = torch.logit(torch.tensor([[[0.9, 0.2], [0.5, 0.5]]]))  # (1, 2 queries, 2 pixels)
    class_scores = scores(class_logits, mask_logits)
    expected = torch.tensor([[[0.6 * 0.9 + 0.05, 0.6 * 0.2 + 0.05], [0.3 * 0.9 + 0.05, 0.3 * 0.2 + 0.05]]])
    torch.testing.assert_close(class_scores, expected)
    probability = scores.normalize(class_scores[..., None])[..., 0]
    torch.testing.assert_close(probability, expected / (0.5 + expected.sum(1, keepdim=True)))


def test_semantic_queries_and_relevance_enter_the_evidence_by_hand():
    scores = ClassScoreHead(semantic=True)
    with torch.no_grad():
        scores.log_instance_weight.fill_(2.0).log_()
        scores.log_semantic_weight.fill_(3.0).log_()
    class_logits = torch.log(torch.tensor([[[0.6, 0.3, 0.1]]]))  # (1, 1 query, 2 classes + none)
    mask_logits = torch.logit(torch.tensor([[[0.9, 0.2]]]))  # (1, 1 query, 2 pixels)
    presence = torch.tensor([[[0.5, 0.0], [0.25, 1.0]]])  # (1, 2 scales, 2 classes)
    regions = torch.tensor([[[[0.8, 0.1], [0.3, 0.7]], [[0.4, 0.6], [0.9, 0.2]]]])  # (1, 2 scales, 2 classes, 2 pixels)
    relevance = torch.tensor([[0.2, 0.5]])
    class_scores = scores(class_logits, mask_logits, torch.logit(presence, 1e-7), torch.logit(regions), relevance)
    gate = torch.tensor([[1 - 0.5 * 0.8, 1 - 1.0 * 0.5], [1 - 0.75 * 0.8, 1.0]])  # (2 scales, 2 classes)
    semantic = 3 * (gate[..., None] * regions[0]).mean(0)
    instance = 2 * torch.tensor([[0.6 * 0.9, 0.6 * 0.2], [0.3 * 0.9, 0.3 * 0.2]])
    torch.testing.assert_close(class_scores[0], relevance[0, :, None] * (semantic + instance))


def test_thin_evidence_cannot_be_sure():
    scores = ClassScoreHead(epsilon=0.1)
    thin = scores.normalize(torch.tensor([0.01, 0.0]).view(1, 2, 1, 1))
    strong = scores.normalize(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
    assert thin.max() < 0.1 and strong.max() > 0.9


def test_windows_cover_every_pixel_and_average():
    image = torch.arange(7 * 11, dtype=torch.float32).view(1, 1, 7, 11)
    torch.testing.assert_close(sliding_window(image, lambda x: 2 * x, (4, 5), (3, 4)), 2 * image)
    torch.testing.assert_close(sliding_window(image, lambda x: x, (20, 20), (9, 9)), image)


def test_a_protocol_says_what_it_is():
    assert str(InferenceProtocol()) == "whole image"
    assert str(InferenceProtocol("sliding", (64, 48), (32, 24), scales=(0.5, 1), flip=True, short_side=60)) == (
        "sliding window 64x48, stride 32x24, short side 60, scales 0.5 1, mirrored too"
    )


def test_gradients_reach_both_parameters():
    scores = ClassScoreHead()
    class_scores = scores(torch.randn(1, 3, 5), torch.randn(1, 3, 7))
    torch.log(scores.epsilon + class_scores.sum(1)).sum().backward()
    assert scores.log_epsilon.grad != 0 and scores.log_instance_weight.grad != 0
