"""Our language models as models of transformers: what `generate` calls a cache is our recurrent state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..core import RecurrentLayer, UsageError, leaves, select
from ..models import TokenModel
from ..serving import Kind, for_streaming
from .directory import FORMAT, KIND, build, described


class StatewiseConfig(PreTrainedConfig):
    """config.json of a LanguageModel: the fields of its description, the number of its ids, and what some ids mean."""

    model_type = KIND
    keys_to_ignore_at_inference = ["past_key_values"]

    format: int = FORMAT
    vocab_size: int | None = None
    description: dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False  # ours are tied by having no head, so no tensor is there twice
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @property
    def hidden_size(self) -> int | None:
        return None if self.description is None else self.description.get("width")

    @property
    def num_hidden_layers(self) -> int | None:
        return None if self.description is None else self.description.get("depth")


class StateCache(Cache):
    """A recurrent state, and how many ids it has seen. The state itself never changes: a copy of this is a fork."""

    def __init__(self, state: Any = None, seen: int = 0):
        super().__init__(layers=[])
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state = select(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = select(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.batch_size, device=_first(self.state).device)
        self.state = select(self.state, rows.repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(_first(self.state))

    def crop(self, tokens_to_remove: int) -> None:
        raise UsageError("a recurrent state cannot be cropped; keep the one from before: copy.copy(cache)")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError("a recurrent state holds no keys and values to add to")


def _first(state: Any) -> Tensor:
    return leaves(state)[0]


class StatewiseForCausalLM(PreTrainedModel, GenerationMixin):
    """A TokenModel behind the interface of transformers' causal language models.

    past_key_values is a StateCache: any number of new ids go on from it, with the same logits as in one pass.
    attention_mask (B, T): the state rests where it is 0, wherever that is, so that rows padded left, right or in
    between give the logits of their ids alone; at padding stand the logits of the last id before it.
    labels: as in transformers, shifted inside, -100 for none.
    Raises UsageError for inputs_embeds, a mask that is not (B, T), and a cache of another kind.
    """

    config_class = StatewiseConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state cannot be rolled back, so assisted decoding refuses
    config: StatewiseConfig

    def __init__(self, config: StatewiseConfig, model: RecurrentLayer[Any] | None = None):
        super().__init__(config)
        if model is None:
            dtype = torch.get_default_dtype()  # that of the checkpoint, while from_pretrained builds
            model = build(described(config.description, "the configuration"), config.vocab_size, dtype)
        if not isinstance(model, TokenModel):
            raise UsageError(f"{type(model).__name__} is no TokenModel: transformers needs logits of ids")
        self.model = model
        self._fast: list[TokenModel] = []  # in a list, so that it is no part of what is saved
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: layers start as their papers say, when they are built."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.body.embed

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise UsageError("the table of a trained model stays: its size is in the description")

    set_output_embeddings = set_input_embeddings

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **_: Any) -> None:
        self.model.body.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.model.body.recompute = False

    def stream(self, weights: Kind = "float32") -> None:
        """Write with weights for streaming and a recorded step from now on (`serving.for_streaming`), on a CPU.

        It takes the steps of `generate`: one new id in each row, up to 8 rows, in evaluation mode and without
        gradients; hooks on parts of the model are not called then. All else goes the usual way. Parameters that change
        in place are seen with weights "float32", others not; after another load, dtype or device call it again.
        Raises UsageError as `for_streaming` does.
        """
        self._fast = [for_streaming(self.model, weights=weights)]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.description is None:
            raise UsageError("save_pretrained: a wrapped model has no description; use statewise.hf.save_pretrained")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None or inputs_embeds is not None:
            raise UsageError(f"{type(self).__name__}: takes input_ids, not inputs_embeds")
        cache = past_key_values
        if cache is not None and not isinstance(cache, StateCache):
            raise UsageError(f"past_key_values is a {type(cache).__name__}; expected the StateCache of an earlier call")
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = StateCache()
        before = None if cache is None else cache.state
        if before is not None and self._is_fast(input_ids, attention_mask):
            logits, state = self._fast[0].step(input_ids[:, 0], before)
            logits = logits[:, None]
        else:
            h, state = self._read(input_ids, before, attention_mask)
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.logits(h[:, keep])
        if cache is not None:
            cache.state, cache.seen = state, cache.seen + input_ids.shape[1]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.out_width, **kwargs)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return found.to_tuple() if return_dict is False else found

    def _is_fast(self, ids: Tensor, mask: Tensor | None) -> bool:
        """Whether this is a step for `stream`."""
        if not self._fast or self.training or torch.is_grad_enabled() or ids.shape[1] != 1:
            return False
        return mask is None or (mask.ndim == 2 and mask.shape[1] > 0 and bool(mask[:, -1].all()))

    def _read(self, ids: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        """What the body gives for ids (B, T) where the mask is not 0: (B, T, D), and the state after them."""
        body, steps = self.model.body, ids.shape[1]
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] < steps:
                raise UsageError(f"attention_mask has shape {tuple(mask.shape)}; expected ({len(ids)}, {steps})")
            mask = mask[:, mask.shape[1] - steps :].bool()  # while writing, it covers what the cache has seen as well
        if mask is None or bool(mask.all()):
            if steps == 1 and state is not None:
                h, state = body.step(ids[:, 0], state)
                return h[:, None], state
            return body(ids, state)
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # the ids that count to the front, in their order
        h, state = body(ids.gather(1, order), state, lengths=mask.sum(1))
        place = mask.cumsum(1) - 1
        h = h.gather(1, place.clamp_min(0)[..., None].expand_as(h))
        return h.masked_fill((place < 0)[..., None], 0), state
