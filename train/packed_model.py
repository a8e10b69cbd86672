"""A Hugging Face Qwen-VL model whose forward takes packed groups and returns what a loss needs, per response token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data.normalise import normalise
from train.fused import fuse_elementwise
from train.group_attention import PACKED, Packed
from train.linear_attention import fork_linear_attention, has_linear_attention
from train.sequence_parallel import join, share_features, take_slice
from train.token_logprobs import output_layer_gives_logprobs
from train.vision import patch_embedding_as_matmul, run_tower, smallest_grid


def add_at_positions(hidden: Tensor, positions: Tensor, features: Tensor) -> Tensor:
    """(1, T, D) hidden states with (M, D) features of the tower added at (M,) positions; a new tensor.

    In place of the library's, which finds the places in a mask: on CUDA the host waits for that, in every such layer.
    """
    return hidden.index_add(1, positions, features.to(hidden.dtype)[None])


class PackedModel(nn.Module):
    """Wraps the model that DeepSpeed shards. One forward = one tower call, one decoder pass, one output-layer call.

    hf: AutoModelForImageTextToText of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 checkpoint.
    normalisation: (mean, std) per channel, see data.normalise.read_normalisation.
    banned_ids: ids that are never sampled; their probability is zero here as it is in the sampler.
    vision_attention: train.vision.VISION_VARLEN or VISION_CUDNN (CUDA, 16 bits); None: the tower's own.
    value_head: build a critic (a value per response token) instead of log-probs; the output layer is dropped.
    fused: compile norms, rotations and gated products (train.fused).
    """

    def __init__(
        self,
        hf: nn.Module,
        *,
        normalisation: tuple[tuple[float, ...], tuple[float, ...]],
        banned_ids: tuple[int, ...] = (),
        logit_chunk: int = 1024,
        vision_attention: str | None = None,
        value_head: nn.Module | None = None,
        fused: bool = False,
    ):
        super().__init__()
        self.hf = hf
        self.normalisation = normalisation
        self.logit_chunk = logit_chunk
        hf.model.language_model.config._attn_implementation = PACKED
        if has_linear_attention(hf.config):
            fork_linear_attention(hf.model.language_model)
        if vision_attention is not None:
            hf.model.visual.config._attn_implementation = vision_attention
        if hasattr(hf.model.language_model, "_deepstack_process"):  # Qwen3-VL
            hf.model.language_model._deepstack_process = add_at_positions
        patch_embedding_as_matmul(hf.model.visual)
        if fused:
            fuse_elementwise(hf)
        self.value_head = value_head
        if value_head is None:
            output_layer_gives_logprobs(hf.lm_head)
        else:
            del hf.lm_head
        banned = torch.tensor(sorted(banned_ids), dtype=torch.long) if banned_ids else None
        self.register_buffer("banned", banned, persistent=False)
        self.banned_array = np.array(sorted(banned_ids), dtype=np.int64) if banned_ids else None

    def visual_features(self, patches: Tensor | None, grid_thw: np.ndarray) -> tuple[list[Tensor], bool]:
        """(features as run_tower gives them, whether they are real). Without media the tower runs on one grey patch:
        under ZeRO-3 every rank has to call it equally often."""
        tower = self.hf.model.visual
        if patches is not None:
            return run_tower(tower, normalise(patches, *self.normalisation), grid_thw), True
        grid, patch_count = smallest_grid(tower)
        projection = tower.patch_embed.proj
        width = projection.in_channels * int(np.prod(projection.kernel_size))
        blank = torch.zeros(patch_count, width, device=self.hf.device)
        return run_tower(tower, blank, grid), False

    def features_of(self, packed: Packed) -> tuple[list[Tensor], bool]:
        """visual_features of a pack; ranks that share its sequence share the tower's work, too."""
        sequence = packed.layout.sequence
        if sequence is None or packed.patches is None:
            return self.visual_features(packed.patches, packed.grid_thw)
        return share_features(self.visual_features, packed, self.hf.model.visual.spatial_merge_size, sequence), True

    def forward(
        self,
        packed: Packed,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        features: list[Tensor] | None = None,
        features_only: bool = False,
    ) -> tuple[Tensor, Tensor] | list[Tensor]:
        """-> (log-probs (N,), entropies (N,)), or (values (N,), zeros) with a value head.

        features: what an earlier call with features_only gave for these groups (frozen tower); the tower is then not
        called. With features_only nothing but the tower runs and its features come back.
        """
        if features_only:
            return self.features_of(packed)[0]
        model, sequence = self.hf.model, packed.layout.sequence
        part = take_slice(packed, sequence) if sequence else None
        mine = part.packed if part else packed  # the tokens that this rank computes
        embedded = model.get_input_embeddings()(mine.input_ids)  # (T, D)
        zero = None
        if features is None:
            features, real = self.features_of(packed)
            if not real:  # in the graph, so that its gradients exist (as zeros) on this rank too
                zero = sum(feature.sum() for feature in features) * 0.0
                features = []
        if features:
            if len(features[0]) != len(packed.visual_positions):
                raise ValueError(
                    f"{len(features[0])} visual features for {len(packed.visual_positions)} visual tokens: the grids "
                    "of a prompt do not match its token ids"
                )
            features = [(feature[part.visual_rows] if part else feature).to(embedded.dtype) for feature in features]
            embedded = embedded.index_copy(0, mine.visual_positions, features[0])
        if zero is not None:
            embedded = embedded + zero.to(embedded.dtype)
        hidden = self.decode(embedded, mine, features[1:])
        if self.value_head is not None:
            values = self.value_head(hidden)[:, 0]
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            per_token = (values, torch.zeros_like(values))
        else:
            per_token = self.hf.lm_head(
                hidden,
                mine.targets,
                temperature=temperature,
                banned=self.banned,
                entropy=entropy,
                chunk=self.logit_chunk,
            )
        if part is None:
            return per_token
        return tuple(join(values, part.own, len(packed.targets), sequence) for values in per_token)

    def decode(self, embedded: Tensor, packed: Packed, deepstack: list[Tensor]) -> Tensor:
        """(T, D) input embeddings -> (N, D) hidden states that predict the response tokens."""
        kwargs = {}
        if deepstack:
            kwargs = {"visual_pos_masks": packed.visual_positions, "deepstack_visual_embeds": deepstack}
        out = self.hf.model.language_model(
            inputs_embeds=embedded[None],
            position_ids=packed.position_ids[:, None],
            attention_mask=None,
            use_cache=False,
            layout=packed.layout,
            **kwargs,
        )
        return out.last_hidden_state[0, packed.predictors]
