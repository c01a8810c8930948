"""Masked-attention transformer decoder (Mask2Former, arXiv 2112.01527, section 3.2) with named classes.

Inputs: memory F1..F3 and mask features M of the pixel decoder, class embeddings T. Output after every layer,
the initial queries included: class logits (B, N, K+1), the last column being "no object", and mask logits
(B, N, H/4, W/4). State-dict names are Mask2Former's, so that its checkpoints load.
"""
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .classifier import build_classifier
from .position import sine_position

_NUM_LEVELS = 3


class Attention(nn.MultiheadAttention):
    """torch's multi-head attention, with a mask that all heads share instead of one copy per head."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads, batch_first=True)

    def forward(self, query, key, value, blocked=None):
        """query (B, Q, C), key and value (B, S, C), blocked (B, Q, S) bool or None -> (B, Q, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        # (B, X, C) -> (B, heads, X, C/heads)
        q, k, v = (F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for x, w, b in zip((query, key, value), weights, biases))
        allowed = None if blocked is None else ~blocked[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position):
        positioned = queries + query_position
        return self.norm(queries + self.self_attn(positioned, positioned, queries))


class CrossAttentionLayer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position, memory, memory_position, blocked):
        attended = self.multihead_attn(queries + query_position, memory + memory_position, memory, blocked)
        return self.norm(queries + attended)


class FeedForwardLayer(nn.Module):
    def __init__(self, dim, feedforward_dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries):
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class MLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, in_dim, hidden_dim, out_dim):
        super().__init__()
        dims = (in_dim, hidden_dim, hidden_dim, out_dim)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class QueryDecoder(nn.Module):
    """See the module's docstring."""

    @configurable
    def __init__(self, *, memory_dim: int, mask_dim: int, hidden_dim: int, num_queries: int, num_heads: int,
                 num_layers: int, feedforward_dim: int, classifier: nn.Module):
        """
        Args:
            memory_dim, mask_dim: widths of F1..F3 and of M.
            num_queries: N instance queries. classifier: module (x (B, N, C), T) -> (B, N, K+1).
        """
        super().__init__()
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, num_heads) for _ in range(num_layers))
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, num_heads) for _ in range(num_layers))
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden_dim, feedforward_dim) for _ in range(num_layers))
        for layers in (self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
                       self.transformer_ffn_layers):
            for parameter in layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(_NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Conv2d(memory_dim, hidden_dim, 1) if memory_dim != hidden_dim else nn.Sequential()
            for _ in range(_NUM_LEVELS))
        self.class_embed = classifier
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim)

    @property
    def num_queries(self) -> int:
        return self.query_feat.num_embeddings

    @classmethod
    def from_config(cls, cfg, num_classes, text_dim):
        options = cfg.MODEL.DECODER
        return {"memory_dim": cfg.MODEL.PIXEL_DECODER.CONV_DIM, "mask_dim": cfg.MODEL.PIXEL_DECODER.MASK_DIM,
                "hidden_dim": options.HIDDEN_DIM, "num_queries": options.NUM_QUERIES,
                "num_heads": options.NUM_HEADS, "num_layers": options.NUM_LAYERS,
                "feedforward_dim": options.FEEDFORWARD_DIM,
                "classifier": build_classifier(options.CLASSIFIER, options.HIDDEN_DIM, num_classes, text_dim)}

    def forward(self, memory, mask_features, text):
        """
        Args:
            memory: [F1, F2, F3], each (B, C, h, w). mask_features: (B, C, H/4, W/4). text: (K, Dt) or None.
        Returns:
            list over predictions (initial queries, then every layer) of {"class_logits", "mask_logits"}.
        """
        batch = memory[0].shape[0]
        tokens, positions, sizes = self._tokens(memory)
        queries = self.query_feat.weight.expand(batch, -1, -1)  # (N, C) -> (B, N, C)
        query_position = self.query_embed.weight
        predictions = [self._predict(queries, mask_features, text)]
        layers = zip(self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
                     self.transformer_ffn_layers)
        for i, (cross, self_attention, feedforward) in enumerate(layers):
            level = i % _NUM_LEVELS
            blocked = _blocked(predictions[-1]["mask_logits"], sizes[level])
            queries = cross(queries, query_position, tokens[level], positions[level], blocked)
            queries = feedforward(self_attention(queries, query_position))
            predictions.append(self._predict(queries, mask_features, text))
        return predictions

    def _tokens(self, memory):
        """Flatten each level: tokens (B, h*w, C), positions (h*w, C), sizes (h, w)."""
        tokens, positions, sizes = [], [], []
        for level, (x, project) in enumerate(zip(memory, self.input_proj)):
            sizes.append(x.shape[-2:])
            tokens.append(project(x).flatten(2).transpose(1, 2) + self.level_embed.weight[level])
            positions.append(sine_position(*sizes[-1], tokens[-1].shape[2], x.device).flatten(1).t())
        return tokens, positions, sizes

    def _predict(self, queries, mask_features, text):
        queries = self.decoder_norm(queries)
        mask_logits = torch.einsum("bnc,bchw->bnhw", self.mask_embed(queries), mask_features)
        return {"class_logits": self.class_embed(queries, text), "mask_logits": mask_logits}


@torch.no_grad()
def _blocked(mask_logits, size):
    """Where a query may not look: outside its own mask; a query with an empty mask looks everywhere.

    (B, N, H, W) -> (B, N, h*w) bool.
    """
    outside = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False).flatten(2) < 0
    return outside & ~outside.all(dim=2, keepdim=True)
