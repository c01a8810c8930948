"""Classifiers of the instance queries: cosines to names, "no object" last."""

import pytest
import torch
import torch.nn.functional as F

from hiervl.errors import UserError
from hiervl.modeling.classifier import TextClassifier, build_classifier

DIM, TEXT_DIM = 8, 6


def test_logits_are_cosines_over_the_temperature():
    classifier = TextClassifier(DIM, TEXT_DIM)
    queries, text = torch.randn(2, 5, DIM), F.normalize(torch.randn(3, TEXT_DIM), dim=1)
    expected = F.cosine_similarity(
        classifier.project(queries)[:, :, None], torch.cat((text, classifier.no_object[None]))[None, None], dim=3
    )
    torch.testing.assert_close(classifier(queries, text), expected / 0.07)


def test_the_temperature_stays_at_or_above_a_hundredth():
    classifier = TextClassifier(DIM, TEXT_DIM)
    queries, text = torch.randn(2, 5, DIM), F.normalize(torch.randn(3, TEXT_DIM), dim=1)
    expected = classifier(queries, text) * 0.07 * 100
    with torch.no_grad():
        classifier.log_scale.fill_(9.0)
    torch.testing.assert_close(classifier(queries, text), expected)


def test_every_image_may_have_its_names():
    classifier, queries = TextClassifier(DIM, TEXT_DIM), torch.randn(2, 5, DIM)
    text = F.normalize(torch.randn(2, 3, TEXT_DIM), dim=2)
    together = classifier(queries, text)
    for b in range(2):
        torch.testing.assert_close(together[b], classifier(queries[b : b + 1], text[b])[0])


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="'cosine' is not one of text, linear"):
        build_classifier("cosine", DIM, 3, TEXT_DIM)
