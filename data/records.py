"""Every record that crosses a door between rooms, and the names of the problem types.

Importable without torch: rewards, data reading and score-only evaluation use it on machines that have none.
Letters in shapes: N prompts, G rollouts per group, B = N*G rows, P prompt tokens, R response tokens (longest of the
batch), F frames, K visual grids (one per image or video), 3 = temporal / height / width axis of M-RoPE.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

SCHEMA_VERSION = 1

# Canonical problem types -> the other names users have for them. A name is trimmed and lower-cased before look-up.
# Nothing else falls back to another type: a fallback pays for the name of a key, not for the answer.
PROBLEM_TYPES: dict[str, tuple[str, ...]] = {
    "multiple choice": ("multiple_choice",),
    "numerical": ("number",),
    "rec": (),  # a count: numerical with an integer gold
    "regression": (),
    "boolean": ("binary classification", "ssr", "crr"),
    "math": ("mathematics",),
    "ocr": (),
    "open-ended": ("open_ended", "video qa", "video description", "free-form", "caption"),
    "temporal grounding": (),
    "spatial grounding": (),
    "spatial-temporal grounding": (),
    "tracking": (),
    "code": ("coding",),
    "svg-code": (),
    "html-code": (),
    "llava": ("critic",),
    "segmentation": (),
    "segmentation_video": (),
}
CANONICAL_TYPE: dict[str, str] = {
    name: canonical for canonical, aliases in PROBLEM_TYPES.items() for name in (canonical, *aliases)
}
DATA_TYPES = ("text", "image", "video", "mixed")


def canonical_problem_type(name: object) -> str:
    """The canonical spelling of a problem type. Raises ValueError listing the known names."""
    key = name.strip().lower() if isinstance(name, str) else ""
    if key not in CANONICAL_TYPE:
        raise ValueError(f"unknown problem_type {name!r}; known: {', '.join(sorted(CANONICAL_TYPE))}")
    return CANONICAL_TYPE[key]


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Encoded bytes of an image or video that stay in their data file; `data.stored.read_stored` reads them.

    `file` is a Parquet file or a save_to_disk folder, `row` counts from 0, `place` leads to the item: the column, then
    indices and names within it. `digest` is the xxh3-128 of the bytes, hex. Equal content is equal, wherever it lies.
    """

    digest: str
    size: int
    file: str = field(compare=False)
    row: int = field(compare=False)
    place: tuple[str | int, ...] = field(compare=False)

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True, slots=True)
class Media:
    """One image or video of a sample: exactly one of `path`, `data` (encoded bytes) and `frames` is set.

    Bytes in a Parquet file or a save_to_disk folder are not held but noted (StoredBytes).
    `frames` is a list of image files that are a video's frames in order, taken at `fps` frames per second.
    `start_s` / `end_s` cut a video to [start_s, end_s) in seconds of presentation time.
    """

    kind: str  # "image" | "video"
    path: str | None = None
    data: bytes | StoredBytes | None = None
    frames: tuple[str, ...] | None = None
    start_s: float | None = None
    end_s: float | None = None
    fps: float | None = None


@dataclass(slots=True)
class Sample:
    """One row of a dataset or benchmark, validated."""

    id: str
    question: str
    answer: Any  # gold, as in the file; rewards read it through the same reader as a prediction
    problem_type: str  # canonical
    data_type: str  # one of DATA_TYPES
    media: tuple[Media, ...] = ()
    options: tuple[str, ...] = ()
    offline_output: str | None = None  # a demonstration response, if the row carries one
    source: str = ""  # data_source of the row, else the file's name
    extra: dict[str, Any] = field(default_factory=dict)  # every other field of the row, flat
    file: str = ""
    line: int = 0


@dataclass(slots=True)
class Prompt:
    """A sample as the model gets it: the same frames, grids and timestamps for vLLM and for the trainer."""

    sample: Sample
    text: str  # chat-template text with one unexpanded marker per medium: what vLLM is given
    vllm_prompt: dict[str, Any]  # argument of LLM.generate: prompt, multi_modal_data, mm_processor_kwargs, ...
    input_ids: np.ndarray  # (P,) int64, visual markers expanded
    position_ids: np.ndarray  # (3, P) int64 M-RoPE
    mm_type_ids: np.ndarray  # (P,) uint8: 0 text, 1 image, 2 video
    patches: np.ndarray | None  # (sum of t*h*w over grids, C*temporal_patch*patch*patch) uint8, media order
    grid_thw: np.ndarray  # (K, 3) int64, in patches (before merging), media order
    grid_kinds: tuple[str, ...] = ()  # (K,) "image" | "video"
    timestamps: tuple[tuple[float, ...], ...] = ()  # per video: seconds of each temporal patch
    cache_key: str = ""  # identity of the visual content; equal keys mean equal pixels


@dataclass(slots=True)
class Response:
    """One rollout, or the demonstration that takes a rollout's place."""

    token_ids: list[int]
    rollout_logprobs: list[float]  # log-prob of each token as vLLM sampled it; empty for a demonstration
    finish_reason: str  # "stop" | "length"
    text: str = ""
    is_demonstration: bool = False
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)  # accuracy, format, overlong ...
    status: str = ""  # word from the scorer: ok, no_answer, several_answers, truncated, timeout ...
    extracted: str | None = None


@dataclass(slots=True)
class Group:
    """The G responses of one prompt. It stays whole on one data-parallel replica."""

    prompt: Prompt
    responses: list[Response]


@dataclass(slots=True)
class Batch:
    """One step's groups on this rank with everything per token. Rows are group-major: row = group * G + slot."""

    groups: list[Group]
    response_mask: torch.Tensor  # (B, R) float, 1 on response tokens
    rewards: torch.Tensor  # (B,) float
    rollout_logprobs: torch.Tensor  # (B, R), 0 where unknown
    is_demonstration: torch.Tensor  # (B,) bool
    truncated: torch.Tensor  # (B,) bool: finish_reason == "length"
    reward_parts: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (B,)
    problem_types: list[str] = field(default_factory=list)  # (B,)
    old_logprobs: torch.Tensor | None = None  # (B, R) policy before this step's updates
    ref_logprobs: torch.Tensor | None = None  # (B, R)
    values: torch.Tensor | None = None  # (B, R) critic
    baseline_rewards: torch.Tensor | None = None  # (N,) greedy reward per prompt (ReMax)
    advantages: torch.Tensor | None = None  # (B, R)
    returns: torch.Tensor | None = None  # (B, R)
