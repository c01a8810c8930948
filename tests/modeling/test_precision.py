"""What needs float32 keeps it under the GPU's autocast lists, which differ from the CPU's.

Tensors are fake: shapes and types on a CUDA device, without values, so this needs no GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hiervl.modeling.inference import upsample_to_image
from tests.networks import make_network


def to_fake_gpu(network):
    """Replace all parameters and buffers by fake ones on a CUDA device. To be called in a FakeTensorMode."""
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    return network


@pytest.fixture
def network():
    return make_network(kind="hiervl").train()


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def gpu_autocast(request, network):
    """CUDA's autocast, with this type, on fake tensors; the network was made before, with values."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", request.param)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


def test_relevance_logits_similarity_and_probabilities_stay_in_float32(network, gpu_autocast):
    to_fake_gpu(network)
    images = torch.empty(2, 3, 64, 64, device="cuda")
    product = images.flatten(2) @ images.flatten(2).transpose(1, 2)
    assert product.dtype == gpu_autocast  # autocast is on
    names, variants = network._names(distractors=True)
    output = network.encode(network.preprocess(images), None, names, variants)
    assert output.mask_features.dtype == gpu_autocast  # and the network runs in it
    selected, prediction = output.selected, output.layers[-1]
    for value in (selected.logits, selected.relevance, selected.pixels, output.aligned.similarity):
        assert value.dtype == torch.float32
    assert prediction.class_logits.dtype == torch.float32
    with torch.autocast("cuda", enabled=False):
        scores = prediction.class_scores(output.mask_features, network.scores, selected.relevance)
        probability = network.scores.normalize(upsample_to_image(scores, (64, 64)))
    assert scores.dtype == probability.dtype == torch.float32
