"""DQTD, the dual-query transformer decoder (docs/how-it-works.md).

Masked attention as in Mask2Former (arXiv 2112.01527, section 3.2), over two sets of queries. Instance queries are
learned and can take any segment. Semantic queries (K' classes at E scales) come from the class names, and each stays
with its class.

Input: memory F1..F3, mask features M, text embeddings T and, optionally, semantic queries. Output: `QueryPredictions`
for the initial queries and after every layer. The state-dict names are Mask2Former's, so that its checkpoints load.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .classifier import build_classifier
from .layers import MLP, Attention, run_layer
from .position import sine_position

_NUM_LEVELS = 3


@dataclass
class QueryPredictions:
    """Predictions of the queries after one layer.

    A mask is stored as an embedding, and its logits at a position are the dot product with the mask features there.
    Masks can therefore be evaluated at sampled points, without computing every query's full-size mask.

    Attributes:
        class_logits: (B, N, K'+1), classes of the instance queries; the last column is "no object".
        mask_embed: (B, N, Cm), mask embeddings of the instance queries.
        presence_logits: (B, E, K') of the semantic queries, or None without semantic queries.
        semantic_mask_embed: (B, E, K', Cm), mask embeddings of the semantic queries, or None without them.
    """

    class_logits: torch.Tensor
    mask_embed: torch.Tensor
    presence_logits: torch.Tensor | None = None
    semantic_mask_embed: torch.Tensor | None = None

    def __getitem__(self, images: slice) -> "QueryPredictions":
        """The predictions of a slice of the batch."""
        tensors = (self.class_logits, self.mask_embed, self.presence_logits, self.semantic_mask_embed)
        return QueryPredictions(*(None if tensor is None else tensor[images] for tensor in tensors))

    def mask_logits(self, mask_features) -> torch.Tensor:
        """Mask logits of the instance queries: M (B, Cm, h, w) -> (B, N, h, w)."""
        return torch.einsum("bnc,bchw->bnhw", self.mask_embed.float(), mask_features.float())

    def semantic_mask_logits(self, mask_features) -> torch.Tensor:
        """Mask logits of the semantic queries: M (B, Cm, h, w) -> (B, E, K', h, w)."""
        return torch.einsum("bekc,bchw->bekhw", self.semantic_mask_embed.float(), mask_features.float())

    def class_scores(self, mask_features, score_head, relevance=None) -> torch.Tensor:
        """Class scores of the selected classes at every position of M: (B, Cm, h, w) -> (B, K', h, w).

        Args:
            mask_features: M, (B, Cm, h, w).
            score_head: the ClassScoreHead that combines the queries' predictions.
            relevance: (B, K'), relevance of the selected classes, or None.
        """
        if self.semantic_mask_embed is None:
            semantic = ()
        else:
            semantic = (self.presence_logits, self.semantic_mask_logits(mask_features).flatten(3))
        mask_logits = self.mask_logits(mask_features).flatten(2)  # (B, N, h*w)
        scores = score_head(self.class_logits, mask_logits, *semantic, relevance=relevance)  # (B, K', h*w)
        return scores.unflatten(2, mask_features.shape[2:])


@dataclass
class SemanticQueries:
    """The semantic queries as the decoder receives them.

    Attributes:
        queries: (B, E, K', d).
        position: (B, E, K', d), their position embeddings: the queries before CMSAM's update.
        log_relevance: (B, K'), attention bias for the classes.
        similarity: (B, K', h, w), pixel-text similarity, positive where the class is likely; or None.
    """

    queries: torch.Tensor
    position: torch.Tensor
    log_relevance: torch.Tensor
    similarity: torch.Tensor | None


class SelfAttentionLayer(nn.Module):
    """Self-attention among the queries, with a residual connection and layer normalization."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position, bias=None):
        """queries (B, Q, C), positions (B, Q, C) or (Q, C), attention bias (B, 1, Q) or None -> (B, Q, C)."""
        positioned = queries + query_position
        return self.norm(queries + self.self_attn(positioned, positioned, queries, bias))


class CrossAttentionLayer(nn.Module):
    """Masked cross-attention from the queries to the memory, with a residual connection and layer normalization."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position, memory, memory_position, visible):
        """queries (B, Q, C), memory (B, S, C), their positions, visible (B, Q, S) bool -> (B, Q, C)."""
        attended = self.multihead_attn(queries + query_position, memory + memory_position, memory, visible)
        return self.norm(queries + attended)


class FeedForwardLayer(nn.Module):
    """Two linear layers with a residual connection and layer normalization."""

    def __init__(self, dim, feedforward_dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries):
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class SetExchange(nn.Module):
    """Cross-attention from each set of queries to the other, added through per-channel gates that start near zero."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.to_semantic, self.to_instance = Attention(dim, num_heads), Attention(dim, num_heads)
        self.semantic_gate = nn.Parameter(torch.full((dim,), 0.01))
        self.instance_gate = nn.Parameter(torch.full((dim,), 0.01))

    def forward(self, semantic, instance, bias):
        """
        Args:
            semantic: (B, E*K', d).
            instance: (B, N, d).
            bias: (B, 1, E*K'), log relevance of each semantic query's class.
        Returns:
            (semantic, instance), both updated.
        """
        return (
            semantic + self.semantic_gate * self.to_semantic(semantic, instance, instance),
            instance + self.instance_gate * self.to_instance(instance, semantic, semantic, bias),
        )


class QueryDecoder(nn.Module):
    """Masked-attention decoder over instance queries and, optionally, semantic queries; see the module docstring."""

    @configurable
    def __init__(
        self,
        *,
        memory_dim: int,
        mask_dim: int,
        hidden_dim: int,
        num_queries: int,
        num_heads: int,
        num_layers: int,
        feedforward_dim: int,
        classifier: nn.Module,
        semantic: bool = False,
        recompute: bool = False,
    ):
        """
        Args:
            memory_dim: channels of F1..F3.
            mask_dim: channels of M.
            hidden_dim: width of the queries.
            num_queries: N, the number of instance queries.
            num_heads, num_layers, feedforward_dim: settings of the decoder layers.
            classifier: module that maps (queries (B, N, C), T) to class logits (B, N, K'+1).
            semantic: also decode a set of semantic queries.
            recompute: compute the layers' activations again in the backward pass instead of keeping them.
        """
        super().__init__()
        self.semantic, self.recompute = semantic, recompute
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden_dim, num_heads) for _ in range(num_layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttentionLayer(hidden_dim, num_heads) for _ in range(num_layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden_dim, feedforward_dim) for _ in range(num_layers)
        )
        layer_lists = [
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        ]
        if semantic:
            self.exchanges = nn.ModuleList(SetExchange(hidden_dim, num_heads) for _ in range(num_layers))
            layer_lists.append(self.exchanges)
        for parameter in (p for layers in layer_lists for p in layers.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(_NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList(
            nn.Conv2d(memory_dim, hidden_dim, 1) if memory_dim != hidden_dim else nn.Sequential()
            for _ in range(_NUM_LEVELS)
        )
        self.class_embed = classifier
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim)
        if semantic:
            self.set_embed = nn.Embedding(2, hidden_dim)  # semantic, instance
            self.presence_embed = nn.Linear(hidden_dim, 1)

    @property
    def num_queries(self) -> int:
        return self.query_feat.num_embeddings

    @classmethod
    def from_config(cls, cfg, num_classes, text_dim):
        options = cfg.MODEL.DECODER
        return {
            "memory_dim": cfg.MODEL.PIXEL_DECODER.CONV_DIM,
            "mask_dim": cfg.MODEL.PIXEL_DECODER.MASK_DIM,
            "hidden_dim": options.HIDDEN_DIM,
            "num_queries": options.NUM_QUERIES,
            "num_heads": options.NUM_HEADS,
            "num_layers": options.NUM_LAYERS,
            "feedforward_dim": options.FEEDFORWARD_DIM,
            "semantic": cfg.MODEL.DECODER.SEMANTIC,
            "recompute": "decoder" in cfg.SOLVER.ACTIVATION_CHECKPOINTING,
            "classifier": build_classifier(options.CLASSIFIER, options.HIDDEN_DIM, num_classes, text_dim),
        }

    def forward(
        self, memory, mask_features, text, semantic: SemanticQueries = None, last_layer_only: bool = False
    ) -> list:
        """
        Args:
            memory: [F1, F2, F3], each (B, C, h, w).
            mask_features: M, (B, Cm, H/4, W/4).
            text: text embeddings for the classifier, (K, Dt) or (B, K', Dt) per image; None if it uses no text.
            semantic: the semantic queries, or None for a decoder without them.
            last_layer_only: return only the predictions of the last layer and skip the others.
        Returns:
            list of QueryPredictions, for the initial queries and then after every layer.
        """
        tokens, positions, small_masks = self._tokens(memory, mask_features)
        queries = self.query_feat.weight.expand(len(mask_features), -1, -1)  # (N, C) -> (B, N, C)
        position, bias = self.query_embed.weight, None
        if semantic is not None:
            queries, position, bias = self._join(semantic, queries, position)
        predictions, run = [], functools.partial(run_layer, recompute=self.recompute)
        for i in range(len(self.transformer_ffn_layers)):
            normed = self.decoder_norm(queries)
            embed = self.mask_embed(normed)
            if not last_layer_only:
                predictions.append(self._predict(normed, embed, text, semantic))
            level = i % _NUM_LEVELS
            attention_mask = self._attention_mask(embed, small_masks[level], semantic if i == 0 else None)
            queries = run(
                self.transformer_cross_attention_layers[i],
                queries,
                position,
                tokens[level],
                positions[level],
                attention_mask,
            )
            queries = run(self.transformer_self_attention_layers[i], queries, position, bias)
            queries = run(self.transformer_ffn_layers[i], queries)
            if semantic is not None:
                num_semantic = queries.shape[1] - self.num_queries  # E*K'
                semantic_set, instance_set = queries[:, :num_semantic], queries[:, num_semantic:]
                queries = torch.cat(run(self.exchanges[i], semantic_set, instance_set, bias[..., :num_semantic]), 1)
        normed = self.decoder_norm(queries)
        return [*predictions, self._predict(normed, self.mask_embed(normed), text, semantic)]

    def _join(self, semantic, queries, position):
        """Concatenate the two sets of queries, semantic queries first.

        Args:
            semantic: SemanticQueries.
            queries: (B, N, C), the instance queries.
            position: (N, C), their position embeddings.
        Returns:
            queries (B, E*K'+N, C), positions (B, E*K'+N, C), and the bias of self-attention for each key
            (B, 1, E*K'+N): the log relevance of a semantic query's class, 0 for an instance query.
        """
        semantic_embed, instance_embed = self.set_embed.weight
        queries = torch.cat((semantic.queries.flatten(1, 2), queries), dim=1)
        position = torch.cat(
            (
                semantic.position.flatten(1, 2) + semantic_embed,
                (position + instance_embed).expand(len(queries), -1, -1),
            ),
            dim=1,
        )
        num_scales = semantic.queries.shape[1]
        bias = F.pad(semantic.log_relevance.repeat(1, num_scales), (0, self.num_queries))  # (B, E*K'+N)
        return queries, position, bias[:, None]

    def _tokens(self, memory, mask_features):
        """Per level: tokens (B, h*w, C), positions (h*w, C), and M resized to the level (B, Cm, h, w)."""
        tokens, positions, small_masks = [], [], []
        for level, (x, project) in enumerate(zip(memory, self.input_proj)):
            size = x.shape[-2:]
            tokens.append(project(x).flatten(2).transpose(1, 2) + self.level_embed.weight[level])
            positions.append(sine_position(*size, tokens[-1].shape[2], x.device).flatten(1).t())
            with torch.no_grad():
                small_masks.append(F.interpolate(mask_features, size=size, mode="bilinear", align_corners=False))
        return tokens, positions, small_masks

    @torch.no_grad()
    def _attention_mask(self, embed, mask_features, semantic=None):
        """Positions that each query may attend to: embed (B, Q, Cm), mask_features (B, Cm, h, w) -> (B, Q, h*w) bool.

        A query attends inside its predicted mask, or everywhere if that mask is empty. Mask2Former computes the masks
        at full size and then resizes them. Resizing is linear, so masks computed from resized mask features are the
        same and cost less. With `semantic` (in the first layer), a semantic query at any of the E scales attends where
        the pixel-text similarity of its class is not negative.
        """
        visible = embed @ mask_features.flatten(2) >= 0
        if semantic is not None and semantic.similarity is not None:
            similarity = F.interpolate(
                semantic.similarity, size=mask_features.shape[2:], mode="bilinear", align_corners=False
            )
            num_scales = semantic.queries.shape[1]
            likely = (similarity >= 0).flatten(2).repeat(1, num_scales, 1)  # (B, K', h, w) -> (B, E*K', h*w)
            visible = torch.cat((likely, visible[:, likely.shape[1] :]), dim=1)
        return visible | ~visible.any(dim=2, keepdim=True)

    def _predict(self, queries, embed, text, semantic):
        """Predictions from normalized queries (B, Q, C) and their mask embeddings (B, Q, Cm)."""
        if semantic is None:
            return QueryPredictions(self.class_embed(queries, text), embed)
        grid = semantic.queries.shape[1:3]  # E, K'
        num_semantic = queries.shape[1] - self.num_queries  # E*K'
        presence_logits = self.presence_embed(queries[:, :num_semantic])[..., 0].unflatten(1, grid)  # (B, E, K')
        return QueryPredictions(
            class_logits=self.class_embed(queries[:, num_semantic:], text),
            mask_embed=embed[:, num_semantic:],
            presence_logits=presence_logits,
            semantic_mask_embed=embed[:, :num_semantic].unflatten(1, grid),
        )
