"""DQTD, the dual-query transformer decoder: masked attention (Mask2Former, arXiv 2112.01527, section 3.2) over two
sets of queries (docs/how-it-works.md, "two sets of queries").

Instance queries are learned and free to take any segment; semantic queries (K' classes at E scales) come from the
names and stay with their class. Inputs: memory F1..F3, mask features M, class embeddings T, and the semantic queries
where there are any. Output after every layer, the initial queries included: `QueryPredictions`. State-dict names are
Mask2Former's, so that its checkpoints load.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .classifier import build_classifier
from .layers import MLP, Attention
from .position import sine_position

_NUM_LEVELS = 3


@dataclass
class QueryPredictions:
    """What the queries say after one layer. A mask is an embedding: its logits anywhere are the product with the mask
    features there, so that no query's mask is made where nobody looks.

    Attributes:
        class_logits: (B, N, K'+1) of the instance queries, the last column being "no object".
        mask_embed: (B, N, Cm).
        presence_logits: (B, E, K') of the semantic queries; None without them.
        semantic_mask_embed: (B, E, K', Cm), the masks of the semantic queries; None without them.
    """

    class_logits: torch.Tensor
    mask_embed: torch.Tensor
    presence_logits: torch.Tensor | None = None
    semantic_mask_embed: torch.Tensor | None = None

    def __getitem__(self, images: slice) -> "QueryPredictions":
        """Those of some of the images."""
        parts = (self.class_logits, self.mask_embed, self.presence_logits, self.semantic_mask_embed)
        return QueryPredictions(*(None if part is None else part[images] for part in parts))

    def mask_logits(self, mask_features) -> torch.Tensor:
        """Mask logits of the instance queries: M (B, Cm, h, w) -> (B, N, h, w)."""
        return torch.einsum("bnc,bchw->bnhw", self.mask_embed.float(), mask_features.float())

    def semantic_mask_logits(self, mask_features) -> torch.Tensor:
        """Mask logits of the semantic queries: M (B, Cm, h, w) -> (B, E, K', h, w)."""
        return torch.einsum("bekc,bchw->bekhw", self.semantic_mask_embed.float(), mask_features.float())

    def class_scores(self, mask_features, score_head, relevance=None) -> torch.Tensor:
        """Evidence (B, K', h, w) for the selected classes, by `score_head` (ClassScoreHead)."""
        semantic = (
            ()
            if self.semantic_mask_embed is None
            else (self.presence_logits, self.semantic_mask_logits(mask_features).flatten(3))
        )
        flat = score_head(self.class_logits, self.mask_logits(mask_features).flatten(2), *semantic, relevance=relevance)
        return flat.unflatten(2, mask_features.shape[2:])


@dataclass
class SemanticQueries:
    """The semantic set as the decoder takes it over.

    Attributes:
        queries: (B, E, K', d). position: (B, E, K', d), the queries before anything was added to them.
        log_relevance: (B, K').
        similarity: (B, K', h, w), pixel-text similarity, positive where the class may be; or None.
    """

    queries: torch.Tensor
    position: torch.Tensor
    log_relevance: torch.Tensor
    similarity: torch.Tensor | None


class SelfAttentionLayer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position, bias=None):
        positioned = queries + query_position
        return self.norm(queries + self.self_attn(positioned, positioned, queries, bias))


class CrossAttentionLayer(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries, query_position, memory, memory_position, visible):
        attended = self.multihead_attn(queries + query_position, memory + memory_position, memory, visible)
        return self.norm(queries + attended)


class FeedForwardLayer(nn.Module):
    def __init__(self, dim, feedforward_dim):
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries):
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class SetExchange(nn.Module):
    """Each set of queries asks the other one; per-channel gates start near zero."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.to_semantic, self.to_instance = Attention(dim, num_heads), Attention(dim, num_heads)
        self.semantic_gate = nn.Parameter(torch.full((dim,), 0.01))
        self.instance_gate = nn.Parameter(torch.full((dim,), 0.01))

    def forward(self, semantic, instance, bias):
        """semantic (B, E*K', d), instance (B, N, d), bias (B, 1, E*K') log relevance -> both, updated."""
        return (
            semantic + self.semantic_gate * self.to_semantic(semantic, instance, instance),
            instance + self.instance_gate * self.to_instance(instance, semantic, semantic, bias),
        )


class QueryDecoder(nn.Module):
    """See the module's docstring."""

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
    ):
        """
        Args:
            memory_dim, mask_dim: widths of F1..F3 and of M.
            num_queries: N instance queries. classifier: module (x (B, N, C), T) -> (B, N, K'+1).
            semantic: with a set of semantic queries.
        """
        super().__init__()
        self.semantic = semantic
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
            "classifier": build_classifier(options.CLASSIFIER, options.HIDDEN_DIM, num_classes, text_dim),
        }

    def forward(
        self, memory, mask_features, text, semantic: SemanticQueries = None, last_layer_only: bool = False
    ) -> list:
        """
        Args:
            memory: [F1, F2, F3], each (B, C, h, w). mask_features: (B, C, H/4, W/4).
            text: (K, Dt), (B, K', Dt) or None. last_layer_only: nobody asks for more than the last predictions.
        Returns:
            list of QueryPredictions: of the initial queries, then of every layer; with last_layer_only, the last one.
        """
        tokens, positions, small_masks = self._tokens(memory, mask_features)
        queries = self.query_feat.weight.expand(len(mask_features), -1, -1)  # (N, C) -> (B, N, C)
        position, bias = self.query_embed.weight, None
        if semantic is not None:
            queries, position, bias = self._join(semantic, queries, position)
        predictions = []
        for i in range(len(self.transformer_ffn_layers)):
            normed = self.decoder_norm(queries)
            embed = self.mask_embed(normed)
            if not last_layer_only:
                predictions.append(self._predict(normed, embed, text, semantic))
            level = i % _NUM_LEVELS
            attention_mask = self._attention_mask(embed, small_masks[level], semantic if i == 0 else None)
            queries = self.transformer_cross_attention_layers[i](
                queries, position, tokens[level], positions[level], attention_mask
            )
            queries = self.transformer_self_attention_layers[i](queries, position, bias)
            queries = self.transformer_ffn_layers[i](queries)
            if semantic is not None:
                split = queries.shape[1] - self.num_queries
                queries = torch.cat(self.exchanges[i](queries[:, :split], queries[:, split:], bias[..., :split]), 1)
        normed = self.decoder_norm(queries)
        return [*predictions, self._predict(normed, self.mask_embed(normed), text, semantic)]

    def _join(self, semantic, queries, position):
        """Both sets in one row: queries and positions (B, E*K'+N, C), and what self-attention adds for each key
        (B, 1, E*K'+N): the log relevance of a semantic query's class, 0 for an instance query."""
        own_set, other_set = self.set_embed.weight
        queries = torch.cat((semantic.queries.flatten(1, 2), queries), dim=1)
        position = torch.cat(
            (semantic.position.flatten(1, 2) + own_set, (position + other_set).expand(len(queries), -1, -1)), dim=1
        )
        scales = semantic.queries.shape[1]
        bias = F.pad(semantic.log_relevance.repeat(1, scales), (0, self.num_queries))
        return queries, position, bias[:, None]

    def _tokens(self, memory, mask_features):
        """Per level: tokens (B, h*w, C), positions (h*w, C), and M at the level's size (B, Cm, h, w)."""
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
        """Where each query may look: visible its own mask, (B, Q, Cm) and (B, Cm, h, w) -> (B, Q, h*w) bool.

        Resampling is linear, so masks are made at the size at which they are needed. In the first layer the pixel-text
        similarity (`semantic`) decides where a class may be, at all its E scales. A query with an empty mask attends
        everywhere.
        """
        visible = embed @ mask_features.flatten(2) >= 0
        if semantic is not None and semantic.similarity is not None:
            similarity = F.interpolate(
                semantic.similarity, size=mask_features.shape[2:], mode="bilinear", align_corners=False
            )
            first = (similarity >= 0).flatten(2).repeat(1, semantic.queries.shape[1], 1)  # (B, E*K', h*w)
            visible = torch.cat((first, visible[:, first.shape[1] :]), dim=1)
        return visible | ~visible.any(dim=2, keepdim=True)

    def _predict(self, queries, embed, text, semantic):
        """Predictions of normalized queries (B, Q, C) with mask embeddings (B, Q, Cm)."""
        if semantic is None:
            return QueryPredictions(self.class_embed(queries, text), embed)
        grid = semantic.queries.shape[1:3]  # E, K'
        split = queries.shape[1] - self.num_queries
        presence = self.presence_embed(queries[:, :split])[..., 0].unflatten(1, grid)
        return QueryPredictions(
            self.class_embed(queries[:, split:], text), embed[:, split:], presence, embed[:, :split].unflatten(1, grid)
        )
