"""Cutting a mini-batch into micro-batches, or over ranks, leaves the gradient of a real tiny model alone."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data.normalise import read_normalisation
from tests.tiny_models import tiny_model
from tests.train.algorithm_cases import make_args
from tests.train.packed_cases import PromptMaker, float64_throughout
from train.group_attention import pack
from train.losses import LOSS_REDUCTIONS, POLICY_LOSSES, loss_denominator, policy_objective
from train.packed_model import PackedModel

GROUPS = [("video", [5, 9, 3], 1), ("text", [4, 6, 1], 2), ("image", [3, 2, 8], 3), ("text", [1, 2, 3], 4),
          ("video", [7, 1, 2], 5)]  # fmt: skip
CUTS = {  # groups of every micro-batch; ranks are cuts too: each adds its part of the sum
    "two micro-batches": [[0, 1], [2, 3, 4]],
    "five micro-batches": [[0], [1], [2], [3], [4]],
    "two ranks, two and one micro-batches": [[0], [3], [1, 2, 4]],
    "three ranks": [[4, 0], [1], [3, 2]],
}
WIDTH = 9


def padded(rows: torch.Tensor, width: int = WIDTH) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


@pytest.mark.parametrize(
    ("dtype", "limit"), [pytest.param(torch.float64, 1e-12, marks=pytest.mark.slow), (torch.float32, 5e-6)]
)
def test_gradient_is_the_same_however_the_mini_batch_is_cut(dtype, limit):
    """For every loss x reduction, with KL, entropy, sampler weights and a demonstration; norm of the difference / norm."""
    folder = tiny_model("qwen3_vl")
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = PackedModel(
        copy.deepcopy(plain), normalisation=read_normalisation(folder), banned_ids=(440, 441), logit_chunk=7
    ).train()
    maker = PromptMaker(folder, plain.config)
    groups = [maker.group(*case)[0] for case in GROUPS]
    lengths = [len(response.token_ids) for group in groups for response in group.responses]
    mask = (torch.arange(WIDTH) < torch.tensor(lengths).view(-1, 1)).to(dtype)
    names, parameters = zip(*model.hf.named_parameters(), strict=True)

    def forward(indices):
        """-> rows of these groups, their log-probs and entropies, only as wide as this micro-batch needs."""
        packed = pack(
            [groups[i] for i in indices], backend="sdpa", device=torch.device("cpu"), banned_ids=model.banned_array
        )
        logprobs, entropy = model(packed, temperature=1.0, entropy=True)
        rows = torch.tensor([3 * i + slot for i in indices for slot in range(3)])
        return rows, packed.to_rows(logprobs), packed.to_rows(entropy)

    def gradient(pieces, data, args):
        """Sum over the pieces; each knows its own rows and the denominator of the whole mini-batch."""
        denominator = sum(loss_denominator(mask[rows], args.loss_reduction, args) for rows, _, _ in pieces)
        total = None
        for rows, logprobs, entropy in pieces:
            width = logprobs.shape[1]
            own = {name: values[rows][:, :width] for name, values in data.items()}
            demonstration = rows == 14
            share, _ = policy_objective(
                logprobs, entropy, mask=mask[rows][:, :width], is_demonstration=demonstration, denominator=denominator,
                kl_coef=0.05, args=args, **own,
            )  # fmt: skip
            found = torch.autograd.grad(share, parameters, retain_graph=True, materialize_grads=True)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total

    context = float64_throughout() if dtype == torch.float64 else torch.enable_grad()
    with context:
        whole = [forward([0, 1, 2, 3, 4])]
        random = torch.Generator().manual_seed(5)

        def noise(scale):
            return scale * torch.randn(15, WIDTH, generator=random, dtype=torch.float64).to(dtype)

        current = padded(whole[0][1].detach())
        data = {
            "old_logprobs": current + noise(0.2),
            "ref_logprobs": current + noise(0.2),
            "advantages": torch.randn(15, 1, generator=random, dtype=torch.float64).to(dtype).expand(15, WIDTH),
            "weights": noise(0.2).exp(),
        }
        cases = [
            make_args(
                policy_loss=loss, loss_reduction=reduction, entropy_coef=0.02, kl_in="loss", kl_coef=0.05,
                clip_low=0.2, clip_high=0.28, loss_length=WIDTH,
            )
            for loss in POLICY_LOSSES
            for reduction in LOSS_REDUCTIONS
        ]  # fmt: skip
        expected = [gradient(whole, data, args) for args in cases]
        for cut, pieces_of in CUTS.items():
            pieces = [forward(indices) for indices in pieces_of]
            for args, want in zip(cases, expected, strict=True):
                for name, one, other in zip(names, want, gradient(pieces, data, args), strict=True):
                    if one.any():
                        error = ((one - other).norm() / one.norm()).item()
                        assert error <= limit, (cut, args.policy_loss, args.loss_reduction, name, error)
                    else:
                        assert not other.any(), name
