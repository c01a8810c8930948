"""DQTD: attention masks, the exchange between the two sets of queries, and the effect of relevance."""

import pytest
import torch
import torch.nn.functional as F

from hiervl.modeling.classifier import TextClassifier
from hiervl.modeling.dual_query_decoder import QueryDecoder, SemanticQueries

B, K, E, N, D, CM, DT = 2, 4, 3, 5, 16, 8, 12


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return QueryDecoder(
        memory_dim=D,
        mask_dim=CM,
        hidden_dim=D,
        num_queries=N,
        num_heads=4,
        num_layers=3,
        feedforward_dim=32,
        classifier=TextClassifier(D, DT),
        semantic=True,
    ).eval()


def make_inputs(relevance=None):
    """Memory, mask features M, text embeddings of the selected classes, semantic queries."""
    memory = [torch.randn(B, D, size, size) for size in (2, 4, 8)]
    queries = torch.randn(B, E, K, D)
    log_relevance = torch.zeros(B, K) if relevance is None else relevance.log()
    return (
        memory,
        torch.randn(B, CM, 16, 16),
        torch.randn(B, K, DT),
        SemanticQueries(queries, queries, log_relevance, torch.randn(B, K, 16, 16)),
    )


def test_predictions_of_both_sets_after_every_layer(decoder):
    memory, features, text, semantic = make_inputs()
    layers = decoder(memory, features, text, semantic)
    assert len(layers) == 4
    for layer in layers:
        assert layer.class_logits.shape == (B, N, K + 1) and layer.presence_logits.shape == (B, E, K)
        assert layer.mask_logits(features).shape == (B, N, 16, 16)
        assert layer.semantic_mask_logits(features).shape == (B, E, K, 16, 16)
    (last,) = decoder(memory, features, text, semantic, last_layer_only=True)
    torch.testing.assert_close(last.mask_embed, layers[-1].mask_embed)
    torch.testing.assert_close(last.semantic_mask_embed, layers[-1].semantic_mask_embed)


def test_a_query_attends_inside_its_mask_or_everywhere_if_the_mask_is_empty(decoder):
    features = torch.ones(1, CM, 4, 4)
    features[..., :2] = -1
    embed = torch.stack((torch.ones(CM), -torch.ones(CM), torch.zeros(CM)))[None]
    embed[0, 2, 0], features[0, 0] = -1, 1  # this query's mask is negative everywhere
    visible = decoder._attention_mask(embed, features).view(1, 3, 4, 4)
    assert visible[0, 0, :, 2:].all() and not visible[0, 0, :, :2].any()
    assert visible[0, 1, :, :2].all() and not visible[0, 1, :, 2:].any()
    assert visible[0, 2].all()


def test_in_the_first_layer_semantic_queries_attend_where_the_similarity_is_positive(decoder):
    _, _, _, semantic = make_inputs()
    semantic.similarity = torch.full((B, K, 4, 4), -1.0)
    semantic.similarity[:, 1, 0] = 1.0
    visible = decoder._attention_mask(torch.randn(B, E * K + N, CM), torch.randn(B, CM, 4, 4), semantic)
    visible = visible[:, : E * K].view(B, E, K, 4, 4)
    assert visible[:, :, 1, 0].all() and not visible[:, :, 1, 1:].any()
    assert visible[:, :, [0, 2, 3]].all()  # nowhere positive, so they attend everywhere


def test_after_the_first_layer_every_query_attends_inside_its_predicted_mask(decoder):
    memory, features, text, semantic = make_inputs()
    visible = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(lambda module, args: visible.append(args[4]))
    predictions = decoder(memory, features, text, semantic)
    similarity = F.interpolate(semantic.similarity, size=(2, 2), mode="bilinear", align_corners=False)
    for i, size in enumerate((2, 4, 8)):  # layer i reads level i
        small = F.interpolate(features, size=(size, size), mode="bilinear", align_corners=False)
        regions = predictions[i].semantic_mask_logits(small).flatten(1, 2)
        if i == 0:
            regions = similarity.repeat(1, E, 1, 1)
        inside = torch.cat((regions, predictions[i].mask_logits(small)), dim=1).flatten(2) >= 0
        assert torch.equal(visible[i], inside | ~inside.any(dim=2, keepdim=True)), i


def test_the_exchange_between_the_sets_starts_small(decoder):
    exchange, semantic, instance = decoder.exchanges[0], torch.randn(B, E * K, D), torch.randn(B, N, D)
    updated = exchange(semantic, instance, torch.zeros(B, 1, E * K))
    for before, after in zip((semantic, instance), updated):
        assert 0 < (after - before).abs().mean() < 0.05 * before.abs().mean()
    grads = torch.autograd.grad(updated[1].sum(), [exchange.instance_gate])
    assert (grads[0] != 0).any()


def test_a_class_without_relevance_does_not_affect_instance_queries(decoder):
    relevance = torch.ones(B, K)
    relevance[:, 2] = 1e-30
    memory, features, text, semantic = make_inputs(relevance)
    changed = SemanticQueries(semantic.queries.clone(), semantic.position.clone(), semantic.log_relevance, None)
    semantic.similarity = None
    changed.queries[:, :, 2], changed.position[:, :, 2] = torch.randn(B, E, D), torch.randn(B, E, D)
    first, second = (decoder(memory, features, text, s)[-1] for s in (semantic, changed))
    torch.testing.assert_close(first.mask_embed, second.mask_embed)
    torch.testing.assert_close(first.class_logits, second.class_logits)
    assert not torch.allclose(first.semantic_mask_embed[:, :, 2], second.semantic_mask_embed[:, :, 2])


def test_self_attention_knows_each_querys_set_and_its_class_relevance(decoder):
    memory, features, text, semantic = make_inputs(torch.rand(B, K))
    arguments = []
    decoder.transformer_self_attention_layers[1].register_forward_pre_hook(lambda module, args: arguments.append(args))
    decoder(memory, features, text, semantic)
    _, position, bias = arguments[0]
    semantic_embed, instance_embed = decoder.set_embed.weight
    torch.testing.assert_close(position[:, : E * K], semantic.position.flatten(1, 2) + semantic_embed)
    torch.testing.assert_close(position[:, E * K :], (decoder.query_embed.weight + instance_embed).expand(B, -1, -1))
    torch.testing.assert_close(
        bias[:, 0, : E * K].unflatten(1, (E, K)), semantic.log_relevance[:, None].expand(-1, E, -1)
    )
    assert (bias[:, 0, E * K :] == 0).all()
