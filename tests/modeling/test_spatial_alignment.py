"""CMSAM: alignment maps, gated feature exchange, and edge-preserving upsampling."""

import pytest
import torch
import torch.nn.functional as F

from hiervl.modeling.query_generator import SelectedClasses
from hiervl.modeling.spatial_alignment import SpatialAlignment, guided_upsample

B, K, D, CM = 2, 3, 8, 4


def make_selected(queries=None):
    queries = torch.randn(B, 3, K, D) if queries is None else queries
    return SelectedClasses(
        torch.arange(K).expand(B, -1), torch.full((B, K), 0.5), torch.randn(B, K, 16), queries, None, None, None
    )


def make_memory():
    return [torch.randn(B, D, side, side) for side in (2, 4, 8)]


def test_maps_are_the_cosines_of_queries_and_pixels():
    module, selected, memory = SpatialAlignment(dim=D, memory_dim=D), make_selected(), make_memory()
    aligned = module(selected, memory, torch.randn(B, CM, 16, 16))
    for e, scale in enumerate(module.scales):
        query = F.normalize(scale.query(selected.queries[:, e]), dim=-1)  # (B, K, D)
        pixel = F.normalize(scale.pixel(memory[e]), dim=1)
        torch.testing.assert_close(aligned.maps[e], torch.einsum("bkd,bdhw->bkhw", query, pixel))
    assert aligned.similarity.shape == (B, K, 16, 16) and aligned.similarity.abs().max() <= 1 + 1e-5


def test_permuting_the_classes_permutes_everything():
    module, selected, memory = SpatialAlignment(dim=D, memory_dim=D), make_selected(), make_memory()
    features, order = torch.randn(B, CM, 16, 16), torch.tensor([2, 0, 1])
    first, second = (
        module(selected, memory, features),
        module(make_selected(selected.queries[:, :, order]), memory, features),
    )
    torch.testing.assert_close(first.similarity[:, order], second.similarity)
    torch.testing.assert_close(first.queries[:, :, order], second.queries)
    for a, b in zip(first.memory, second.memory):
        torch.testing.assert_close(a, b)


def test_without_feature_exchange_queries_and_memory_are_unchanged():
    selected, memory = make_selected(), make_memory()
    aligned = SpatialAlignment(dim=D, memory_dim=D, feature_exchange=False)(
        selected, memory, torch.randn(B, CM, 16, 16)
    )
    assert torch.equal(aligned.queries, selected.queries)
    assert all(torch.equal(a, b) for a, b in zip(aligned.memory, memory))


def test_feature_exchange_starts_small_and_passes_gradients_both_ways():
    module, selected, memory = SpatialAlignment(dim=D, memory_dim=D), make_selected(), make_memory()
    selected.queries.requires_grad_()
    memory = [x.requires_grad_() for x in memory]
    aligned = module(selected, memory, torch.randn(B, CM, 16, 16))
    assert (aligned.queries - selected.queries).abs().mean() < 0.1 * selected.queries.abs().mean()
    for a, b in zip(aligned.memory, memory):
        assert 0 < (a - b).abs().mean() < 0.1 * b.abs().mean()
    grads = torch.autograd.grad(sum(x.square().sum() for x in aligned.memory), [selected.queries], retain_graph=True)
    assert (grads[0] != 0).any()  # from the pixels to the names
    grads = torch.autograd.grad(aligned.queries.square().sum(), memory)
    assert all((grad != 0).any() for grad in grads)  # from the names to the pixels


def test_queries_ignore_padding():
    module, selected, memory = SpatialAlignment(dim=D, memory_dim=D), make_selected(), make_memory()
    valid_mask = torch.ones(B, 16, 16, dtype=torch.bool)
    valid_mask[:, :, 8:] = False
    features = torch.randn(B, CM, 16, 16)
    changed = [torch.cat((x[..., : x.shape[3] // 2], torch.randn_like(x[..., x.shape[3] // 2 :])), 3) for x in memory]
    torch.testing.assert_close(
        module(selected, memory, features, valid_mask).queries, module(selected, changed, features, valid_mask).queries
    )


def test_upsampling_with_a_uniform_guide_is_bilinear():
    maps = torch.randn(B, K, 5, 7)
    torch.testing.assert_close(
        guided_upsample(maps, torch.ones(B, CM, 10, 14)),
        F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False),
    )


def brute_force(maps, guide, temperature=0.1):
    """Reference for guided_upsample: a loop over positions and their four nearest cells."""
    height, width = maps.shape[-2:]
    fine = F.normalize(guide, dim=1)
    coarse = F.normalize(F.avg_pool2d(fine, 2), dim=1)
    result = maps.new_zeros(*maps.shape[:2], 2 * height, 2 * width)
    for b in range(len(maps)):
        for y in range(2 * height):
            for x in range(2 * width):
                total, norm = 0, 0
                for row, wy in ((y // 2, 0.75), (y // 2 + (1 if y % 2 else -1), 0.25)):
                    for column, wx in ((x // 2, 0.75), (x // 2 + (1 if x % 2 else -1), 0.25)):
                        r, c = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
                        weight = wy * wx * torch.exp(fine[b, :, y, x] @ coarse[b, :, r, c] / temperature)
                        total, norm = total + weight * maps[b, :, r, c], norm + weight
                result[b, :, y, x] = total / norm
    return result


def test_upsampling_equals_brute_force():
    maps, guide = torch.randn(1, K, 3, 4), torch.randn(1, CM, 6, 8)
    torch.testing.assert_close(guided_upsample(maps, guide), brute_force(maps, guide))


def test_guided_upsampling_keeps_an_edge_that_bilinear_upsampling_blurs():
    guide = torch.zeros(1, 2, 8, 8)
    guide[:, 0, :, :4], guide[:, 1, :, 4:] = 1, 1
    maps = torch.zeros(1, 1, 4, 4)
    maps[..., :2] = 1
    target = guide[:, :1]
    guided = (guided_upsample(maps, guide) - target).abs().max()
    bilinear = (F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False) - target).abs().max()
    assert guided < 0.01 < bilinear


@pytest.mark.parametrize("guided_upsampling", [True, False])
def test_the_guide_gets_no_gradient(guided_upsampling):
    module = SpatialAlignment(dim=D, memory_dim=D, guided_upsampling=guided_upsampling)
    features = torch.randn(B, CM, 16, 16, requires_grad=True)
    module(make_selected(), make_memory(), features).similarity.sum().backward()
    assert features.grad is None


def test_the_best_of_several_texts_counts_at_each_pixel():
    module, memory, features = SpatialAlignment(dim=D, memory_dim=D), make_memory(), torch.randn(B, CM, 16, 16)
    first, second = make_selected(), make_selected()
    both = make_selected(first.queries)
    both.variants = torch.stack((first.queries, second.queries), dim=3)  # (B, E, K, 2, D)
    maps = [module(selected, memory, features).maps for selected in (first, second, both)]
    for first_map, second_map, combined_map in zip(*maps):
        torch.testing.assert_close(combined_map, torch.maximum(first_map, second_map))


def test_feature_exchange_equals_its_formula():
    """At every scale, pixel by pixel and class by class."""
    module, memory = SpatialAlignment(dim=D, memory_dim=D), make_memory()
    selected = make_selected()
    selected.relevance[:] = torch.tensor([0.9, 0.1, 0.4])
    for scale in module.scales:
        torch.nn.init.normal_(scale.pixel_gate.weight, std=0.1)
        torch.nn.init.constant_(scale.none_of_these, 0.3)
    with torch.no_grad():
        aligned = module(selected, memory, torch.randn(B, CM, 16, 16))
        for e, scale in enumerate(module.scales):
            maps, tokens = aligned.maps[e].flatten(2), memory[e].flatten(2).transpose(1, 2)  # (B, K, S), (B, S, D)
            over_pixels = (maps / scale.over_pixels()).exp()
            over_pixels = over_pixels / over_pixels.sum(2, keepdim=True)
            gathered = torch.einsum("bks,bsd->bkd", over_pixels, tokens)
            queries = selected.queries[:, e] + scale.query_gate.sigmoid() * scale.to_query(gathered)
            torch.testing.assert_close(aligned.queries[:, e], queries)
            over_classes = selected.relevance[..., None] * (maps / scale.over_classes()).exp()
            over_classes = over_classes / (over_classes.sum(1, keepdim=True) + (0.3 / scale.over_classes()).exp())
            update = torch.einsum("bks,bkd->bds", over_classes, scale.to_pixel(selected.queries[:, e]))
            update = update.unflatten(2, memory[e].shape[2:])
            gate = scale.pixel_gate(torch.cat((memory[e], update, aligned.maps[e].amax(1, keepdim=True)), dim=1))
            torch.testing.assert_close(aligned.memory[e], memory[e] + gate.sigmoid() * update)
