"""The small values that travel between the caller and the kernels: LMHead, TopK, TokenStats, DistillStats, Need.

Reads transformers and PEFT models by their attribute names; neither is imported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import ranks
from .dispatch import DTYPES, HALVES, acc_dtype
from .options import FINITE, RANGE, check_number, check_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TopK(NamedTuple):
    """The k largest logits of each token, and everything that the rest of the vocabulary adds to a softmax.

    Plain data: edit `values` (demote a token, insert another) to make the targets of UNDIAL- or SHRED-like
    methods. The tail is carried and not the total: the total follows from it exactly, the tail does not follow
    from the total (1 - sum p has no digit left in fp32 when the tail is light).

    Attributes:
        values: `[..., K]` logits z after scale and softcap, **before** temperature, descending; fp32 (fp64 for
            fp64 inputs). A value of -inf marks an absent slot (ragged rows).
        indices: `[..., K]` int64 ids. Those of a token must differ: a repeated id is counted twice.
        tail_logsumexp: `[...]` log-sum-exp of z / temperature over the ids that were **not** selected; -inf when
            nothing is left. None where it is not known: only the normalizations `tail`, `truncated` and
            `generalized` read it.
        temperature: the temperature T of `tail_logsumexp`.
        log_probabilities: the values are logits minus a constant of each token that nobody knows (`from_logprobs`).
            Losses of raw logits refuse them.
    """

    values: Tensor
    indices: Tensor
    tail_logsumexp: Tensor | None = None
    temperature: float = 1.0
    log_probabilities: bool = False

    @property
    def logsumexp(self) -> Tensor:
        """`[...]` log-sum-exp of z / temperature over the whole vocabulary."""
        if self.tail_logsumexp is None:
            raise ValueError(
                "tail_logsumexp: is None, but the log-sum-exp over the whole vocabulary needs it"
            )
        values = self.values.to(acc_dtype(self.values.dtype))
        return torch.logaddexp(torch.logsumexp(values / self.temperature, -1), self.tail_logsumexp)

    @classmethod
    def from_logprobs(cls, indices: Tensor, logprobs: Tensor, *, temperature: float = 1.0) -> TopK:
        """A teacher's top-k from log-probabilities, as an API, vLLM, SGLang or a dataset's columns give them.

        `values = T log p`, `tail = log(1 - sum p)`, with p over the whole vocabulary at temperature T. Slots may be in
        any order and an id may be met twice (vLLM appends the sampled token): it counts once, with its first value.

        Args:
            indices: `[..., K]` int64 or int32 ids; -1 marks an absent slot.
            logprobs: `[..., K]` log p <= 0 in nats, floating point; -inf marks an absent slot.
            temperature: T at which the log-probabilities were made, > 0.

        Returns:
            TopK: values `[..., K]` descending, absent slots last; fp32 (fp64 for fp64). The tail is -inf where the k
            hold all the mass, as soon as their sum rounds to 1; with `normalization="tail"` a `reverse_kl` or `symmetric_kl`
            is then infinite where the student has mass there: clamp it, `top._replace(tail_logsumexp=...clamp(min=-16))`. It
            is summed in fp64 and has as many digits as the log-probabilities allow.

        Raises:
            TypeError, ValueError: naming the argument; on a CPU also probabilities that sum to more than 1.01.

        Memory: a few `[..., K]` tensors.
        Source: `prompt_logprobs` of vLLM; top-k columns of axolotl and DistillKit.

        Example:
            >>> logprobs = torch.tensor([[0.25, 0.5, 0.25]]).log()
            >>> top = TopK.from_logprobs(torch.tensor([[7, 3, -1]]), logprobs)
            >>> top.indices.tolist(), top.values.exp().tolist(), top.tail_logsumexp.exp().tolist()
            ([[3, 7, 0]], [[0.5, 0.25, 0.0]], [0.25])
        """
        check_tensor("indices", indices)
        check_tensor("logprobs", logprobs, indices.device, "indices")
        if indices.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"indices: wanted int64 or int32 ids, got {indices.dtype}")
        if not logprobs.is_floating_point():
            raise TypeError(f"logprobs: wanted floating-point log-probabilities, got {logprobs.dtype}")
        if indices.dim() == 0 or indices.shape != logprobs.shape or indices.shape[-1] == 0:
            raise ValueError(
                f"logprobs: wanted shape [..., K] with K >= 1 like indices {list(indices.shape)}, got {list(logprobs.shape)}"
            )
        positive = math.ulp(0.0), FINITE[1]
        temperature = check_number("temperature", temperature, positive, "a finite number > 0")
        # In the order of the ids equal ones stand side by side; a stable sort keeps the first of them first.
        ids, order = torch.where(logprobs == -torch.inf, -1, indices.long()).sort(dim=-1, stable=True)
        log_p = logprobs.detach().double().gather(-1, order)
        absent = ids < 0
        absent[..., 1:] |= ids[..., 1:] == ids[..., :-1]
        log_p, order = log_p.masked_fill(absent, -torch.inf).sort(dim=-1, descending=True, stable=True)
        ids = ids.masked_fill(absent, 0).gather(-1, order)
        total = log_p.logsumexp(-1)
        if total.device.type == "cpu" and not torch.compiler.is_compiling() and bool((total > 0.01).any()):
            raise ValueError(
                f"logprobs: wanted log-probabilities, whose exponentials sum to 1 at most, got a sum of {total[total > 0.01].max().exp():.3g}"
            )
        # log(1 - exp(total)): each form is exact where the other one loses digits.
        inside = total.clamp(max=0)
        tail = torch.where(inside > -0.693, (-inside.expm1()).log(), (-inside.exp()).log1p())
        acc = acc_dtype(logprobs.dtype)
        return cls((log_p * temperature).to(acc), ids, tail.to(acc), temperature, log_probabilities=True)


_OfTokens = TypeVar("_OfTokens", Tensor, TopK)


class TokenStats(NamedTuple):
    """What one pass over the vocabulary says about each token's distribution (nats; fp32, fp64 for fp64 inputs).

    Attributes:
        logsumexp: `[...]` log-sum-exp of the logits.
        entropy: `[...]` H = -sum p log p.
        logprob_variance: `[...]` variance of log p under p (Min-K%++ divides by its root).
        label_logprob: `[...]` log p(label), or None when no labels were given.
    """

    logsumexp: Tensor
    entropy: Tensor
    logprob_variance: Tensor
    label_logprob: Tensor | None = None


class DistillStats(NamedTuple):
    """What `topk_distill_stats` says of each token; None for what was not asked for. fp32 (fp64 for fp64 inputs).

    Attributes:
        loss: `[...]` the divergence, differentiable.
        logprob: `[...]` log q(token), differentiable.
        entropy: `[...]` -sum q log q of the student over the vocabulary, a constant.
        student_mass: `[...]` what the student's softmax gives to the teacher's k ids, a constant; None where nothing needed
            its log-sum-exp.
        teacher_mass: `[...]` what the teacher's softmax gives to them, a constant; None where its tail is not known at T.
        overlap: `[...]` share of the teacher's ids that are among the student's own k largest, a constant.
    """

    loss: Tensor
    logprob: Tensor | None = None
    entropy: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None
    overlap: Tensor | None = None


class Need(NamedTuple):
    """Which gradients are asked for: in the hidden states, the weight and the bias."""

    hidden: bool
    weight: bool = False
    bias: bool = False


_SCALES = 1e-4, 1e4  # beyond these fp32 logits are too small or too coarse for a softmax
_OF_SCALE = f"{RANGE.replace('> 0', 'other than 0')} or its negative"


class _Between(NamedTuple):
    """Which fields of a text configuration say what happens between the output layer and the logits."""

    softcap: str | None = None
    factor: str | None = None
    divisor: str | None = None


# model types of transformers whose logits are h W^T + b as they stand
_PLAIN = """
    afmoe apertus arcee bamba bitnet bloom codegen cwm dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe
    exaone4 falcon falcon_mamba flex_olmo gemma gemma3 glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gpt_oss gptj helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe lfm2 lfm2_moe llama llama4 llama4_text mamba mamba2
    minimax minimax_m2 ministral ministral3 mistral mistral3 mixtral mpt nemotron nemotron_h olmo olmo2 olmo3 olmoe opt
    persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
    qwen3_moe qwen3_next qwen3_vl seed_oss smollm3 solar_open stablelm starcoder2 xglm zamba zamba2
"""
_SOFTCAPPED = "gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text nanochat vaultgemma"
_DIVIDED = "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared"
_BETWEEN: dict[str, _Between] = (
    dict.fromkeys(_PLAIN.split(), _Between())
    | dict.fromkeys(_SOFTCAPPED.split(), _Between(softcap="final_logit_softcapping"))
    | dict.fromkeys(_DIVIDED.split(), _Between(divisor="logits_scaling"))
    | dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _Between(factor="logit_scale"))
    | {
        "falcon_h1": _Between(factor="lm_head_multiplier"),
        "hyperclovax": _Between(factor="logits_scaling"),  # the same name as Granite's, the other way round
        "recurrent_gemma": _Between(softcap="logits_soft_cap"),
        "xlstm": _Between(softcap="output_logit_soft_cap"),
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class LMHead:
    """The last projection of a language model: `z = softcap(scale * (h W^T + b))`.

    `softcap(x) = c tanh(x / c)` (Gemma 2). Cheap to make anew at every step; holds references, copies nothing.

    Its rows may lie on the processes ("ranks") of a group: the vocabulary-parallel head of Megatron, or the DTensor of FSDP2.
    Rank 0 has the first ids. Then every rank has to make the same calls, with **the same tokens** and the same teacher,
    labels and mask; each gets the same results, its own rows of dW, and the whole dh (`docs/distil.md`). Where each rank has
    tokens of its own, `gather_tokens` comes first.

    Args:
        weight: `[V, D]` floating point. With a group this rank's rows, of which each rank may have another number, 0 too. A
            DTensor with the placement Shard(0) brings its group along.
        bias: `[V]` or None, in the dtype of `weight`, and sharded as it is.
        softcap: c, 1e-4 to 1e4, or None.
        scale: factor on the logits before the softcap, 1e-4 to 1e4 or the negative of that (Cohere: `logit_scale`;
            Granite: `1 / logits_scaling`).
        vocab_size: only the first ids count (vocabularies padded for speed); None counts all V. With a group: of all
            ranks together.
        group: the ranks that hold the rows, or None where `weight` has all of them.
        shards: how many rows each rank of the group has, in the order of the ranks. None asks them: making the head is then
            a collective call.

    Attributes:
        num_ids: how many ids count: `vocab_size`, or V. With a group: of all ranks.
        acc: the dtype of the logits: fp64 for an fp64 weight, else fp32.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.

    Example:
        >>> head = LMHead(torch.zeros(10, 4), softcap=30.0, vocab_size=8)
        >>> head.num_ids, head.hidden_size
        (8, 4)
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    group: ProcessGroup | None = None
    shards: tuple[int, ...] | None = None
    num_ids: int = dataclasses.field(init=False)
    acc: torch.dtype = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if "DTensor" in (type(self.weight).__name__, type(self.bias).__name__):
            self._take_local_rows()
        weight, bias = check_tensor("head.weight", self.weight), self.bias
        if weight.dim() != 2:
            raise ValueError(f"head.weight: wanted shape [V, D], got {list(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise TypeError(
                f"head.weight: wanted fp32, fp16, bf16 or fp64, got {weight.dtype} (dequantise the LM head first)"
            )
        if bias is not None:
            if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
                got = list(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
                raise ValueError(f"head.bias: wanted shape [{weight.shape[0]}], got {got}")
            if bias.dtype != weight.dtype or bias.device != weight.device:
                raise ValueError(
                    f"head.bias: wanted {weight.dtype} on {weight.device} like head.weight, "
                    f"got {bias.dtype} on {bias.device}"
                )
        if self.softcap is not None:
            softcap = check_number("head.softcap", self.softcap, _SCALES, f"{RANGE}, or None")
            object.__setattr__(self, "softcap", softcap)
        scale = check_number("head.scale", self.scale, _SCALES, _OF_SCALE, signed=True)
        object.__setattr__(self, "scale", scale)
        if self.group is not None or self.shards is not None:
            self._check_shards()
        size, rows = self.vocab_size, sum(self.shards or weight.shape[:1])
        if size is not None:
            size = check_number("head.vocab_size", size, (1, rows), "None or an integer from {} to {}", int)
        object.__setattr__(self, "num_ids", rows if size is None else size)
        object.__setattr__(self, "acc", acc_dtype(weight.dtype))

    def _take_local_rows(self) -> None:
        """Put this rank's rows in the place of DTensors, with the group and the shards of their mesh."""
        for name, given in (("group", self.group), ("shards", self.shards)):
            if given is not None:
                raise ValueError(
                    f"head.{name}: the DTensor has {name} of its own, those of its mesh; wanted None, got {given!r}"
                )
        if not ranks.is_dtensor(self.weight) or not (self.bias is None or ranks.is_dtensor(self.bias)):
            raise TypeError(
                "head.bias: wanted a DTensor where head.weight is one, and a plain tensor where it is not"
            )
        weight, group, shards = ranks.local_rows("head.weight", self.weight)
        if self.bias is not None:
            bias, its_group, its_shards = ranks.local_rows("head.bias", self.bias)
            if not ranks.same_ranks(its_group, group) or its_shards != shards:
                raise ValueError("head.bias: wanted the mesh and the shards of head.weight")
            object.__setattr__(self, "bias", bias)
        for name, value in (("weight", weight), ("group", group), ("shards", shards)):
            object.__setattr__(self, name, value)

    def _check_shards(self) -> None:
        group, shards, rows = self.group, self.shards, len(self.weight)
        if group is None:
            raise ValueError("head.shards: are the rows of each rank of a group, got no group")
        ranks.check_group(group)
        if shards is None:
            shards = ranks.row_counts(rows, self.weight.device, group)
        if not isinstance(shards, (tuple, list)) or any(type(n) is not int for n in shards):
            raise TypeError(f"head.shards: wanted an integer for each rank, got {shards!r}")
        if len(shards) != group.size() or shards[group.rank()] != rows or min(shards) < 0:
            raise ValueError(
                f"head.shards: wanted the number of rows of each of {group.size()} ranks, {rows} for rank {group.rank()}, "
                f"got {shards!r}"
            )
        object.__setattr__(self, "shards", tuple(shards))

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def finish_(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Turn the product h W^T into logits, in place; `bias` is that of its columns."""
        if bias is not None:
            z += bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / d(h W^T), from the logits z themselves."""
        if self.softcap is None:
            return self.scale
        # (c - z)(c + z) / c^2: near saturation c - z is exact, where 1 - (z / c)^2 has lost its digits.
        return (self.softcap - z).mul_(self.softcap + z).mul_(self.scale / self.softcap**2)

    def narrowed(self, num_ids: int | None = None) -> LMHead:
        """The same head with weight and bias cut (as views) to the ids that count; a sharded one is not cut."""
        size = self.num_ids if num_ids is None else min(num_ids, self.num_ids)
        if self.group is not None:
            return self if size == self.num_ids else dataclasses.replace(self, vocab_size=size)
        if size == self.weight.shape[0]:
            return self if self.vocab_size is None else dataclasses.replace(self, vocab_size=None)
        return self.cut_to(slice(size))

    def cut_to(self, rows: slice) -> LMHead:
        """A head of some of the rows that lie here (views), which all count."""
        weight, bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        return dataclasses.replace(self, weight=weight, bias=bias, vocab_size=None, group=None, shards=None)

    def detach(self) -> LMHead:
        """The same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return dataclasses.replace(self, weight=self.weight.detach(), bias=bias)

    def gather_tokens(self, x: _OfTokens, *, averaged: bool = True) -> _OfTokens:
        """The tokens of all ranks of the group, those of rank 0 first, where each rank has tokens of its own (FSDP, DDP).

        Call it for the hidden states, and for everything that belongs to tokens (the teacher, labels, mask). The loss is then
        that of all tokens, the same on every rank; each rank gets the gradient of its own hidden states.

        Args:
            x: `[n, ...]` with n of this rank, or a `TopK` of such; another rank may have another n.
            averaged: whether the gradients of the layers below are averaged over the ranks later, as FSDP and DDP do, and
                not summed. The gradient is then multiplied by the number of ranks, so that their mean is the sum that the
                loss of all tokens asks for.

        Returns:
            `[sum of n, ...]`, or a `TopK` of such.

        Memory: x of all ranks. Sent: x, filled up to the largest n, and 512 bytes from each rank; nothing backward.

        Raises:
            TypeError: a dtype that is not sent (int16).
            ValueError: the head has no group; or, on every rank, x differs between ranks in more than the number of tokens.
        """
        if self.group is None:
            raise ValueError("head.group: is None, there are no other ranks to gather tokens from")
        if isinstance(x, TopK):
            tensors = {name: y for name, y in x._asdict().items() if isinstance(y, Tensor)}
            kind = "log-probabilities" if x.log_probabilities else "logits"
            kind = f"a TopK of {kind} at temperature {x.temperature}"
            return x._replace(**ranks.gather_tokens(tensors, self.group, averaged, kind))
        return ranks.gather_tokens({"x": x}, self.group, averaged)["x"]

    @classmethod
    def of(cls, model: Any) -> LMHead:
        """Read the head of a transformers causal language model, also behind PEFT's `modules_to_save`.

        Reads weight and bias of `model.get_output_embeddings()`, and from the text configuration `vocab_size` and what the
        model type does to its logits: a softcap (Gemma, RecurrentGemma, xLSTM), a factor (Cohere, Falcon-H1,
        HyperCLOVA X) or a divisor (Granite). Of a model under FSDP2, outside of its forward pass, it is a sharded head.

        Raises:
            TypeError: the model type is not known; the output layer is missing, carries an adapter, is quantised, is
                offloaded, or is not a plain linear layer. Nothing is guessed. Hooks of the output layer, and a `forward` that was
                replaced on the layer itself, are not looked at: accelerate and FSDP need them. They must not change the logits.
        """
        name = type(model).__name__
        module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if module is None:
            wraps = hasattr(getattr(model, "module", None), "get_output_embeddings")  # as DDP does
            wanted = "its .module" if wraps else "the causal language model, not its backbone"
            raise TypeError(
                f"model: {name} has no output embeddings; pass {wanted}, or build LMHead(weight, ...) by hand"
            )
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            # PEFT's full copy of a layer. It is what the forward uses, unless adapters are switched off.
            active = [a for a in module.active_adapters if a in module.modules_to_save]
            off = module.disable_adapters or not active
            module = module.original_module if off else module.modules_to_save[active[0]]
        weight = getattr(module, "weight", None)
        plain = type(weight) in (nn.Parameter, Tensor) or ranks.is_dtensor(weight)
        if type(module).forward is not nn.Linear.forward or not plain:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise TypeError(
                f"model: the output layer of {name} is a {kind} (weight {type(weight).__name__}), not a plain "
                "torch.nn.Linear. Take adapters and quantisation off the LM head, or build LMHead(...) by hand"
            )
        if module.weight.device.type == "meta":
            raise TypeError(
                f"model: the weight of the output layer of {name} is not in memory (a meta tensor: device_map offloaded it, or "
                "it was never loaded). Load the model whole, on one device"
            )
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in _BETWEEN:
            raise TypeError(
                f"model: what {name} (model type {kind!r}) does to its logits is not known. Build the head by hand, "
                "LMHead(model.get_output_embeddings().weight, bias, softcap=..., scale=...), and compare it with the model's "
                "own logits: LMHead.verify(model, input_ids, head)"
            )
        between = _BETWEEN[kind]
        if config is not None and hasattr(config, "get_text_config"):
            config = config.get_text_config()

        def number(field: str | None) -> float | None:
            value = None if field is None else getattr(config, field, None)
            return None if value is None else float(value)

        factor, divisor = number(between.factor), number(between.divisor)
        size = getattr(config, "vocab_size", None)
        return cls(
            module.weight,
            module.bias,
            softcap=number(between.softcap),
            scale=(1.0 if factor is None else factor) / (1.0 if divisor is None else divisor),
            vocab_size=size if size is not None and size < module.weight.shape[0] else None,
        )

    @classmethod
    @torch.no_grad()
    def verify(cls, model: Any, input_ids: Tensor, head: LMHead | Tensor | None = None) -> LMHead:
        """Compare a head with the logits that the model itself gives, from the very states that its output layer reads.

        Args:
            model: with `get_output_embeddings()`; called as `model(input_ids)`, and as it is: put it in evaluation mode.
            input_ids: `[B, S]` int64 token ids.
            head: made by hand, or its weight; None: `LMHead.of(model)`.

        Returns:
            the head.

        Raises:
            TypeError: `LMHead.of` does not know the model.
            ValueError: the logits differ by more than 1e-5 of the largest one (half precision: 4 units of its last place),
                the model does not call its output layer, or the head is sharded.

        Memory: the model's logits, twice, in fp32.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=4, n_layer=1, n_head=1)).eval()
            >>> LMHead.verify(model, torch.tensor([[5, 6, 7]])).num_ids
            10
        """
        head, seen = cls.of(model) if head is None else as_head(head), []
        if head.group is not None:
            raise ValueError(
                "head.group: wanted a whole head to compare with the model's logits, got a sharded one"
            )
        name, module = type(model).__name__, model.get_output_embeddings()
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        try:
            logits = model(input_ids).logits
        finally:
            handle.remove()
        if len(seen) != 1:
            raise ValueError(f"model: wanted one call of the output layer of {name}, got {len(seen)}")
        if seen[0].shape[-1] != head.hidden_size:
            raise ValueError(
                f"head: reads {head.hidden_size} numbers a token, the output layer of {name} reads {seen[0].shape[-1]}"
            )
        cut = head.narrowed()
        bias = None if cut.bias is None else cut.bias.to(head.acc)
        ours = cut.finish_(seen[0].to(head.acc) @ cut.weight.to(head.acc).t(), bias)
        theirs = logits[..., : head.num_ids].to(ours)
        size = logits.shape[-1]  # a head may leave out ids that the model has, if its weight has them
        if ours.shape != theirs.shape or size not in (len(head.weight), head.num_ids):
            raise ValueError(
                f"head: gives logits of shape {list(ours.shape)}, the model gives {list(logits.shape)}"
            )
        half = head.weight.dtype in HALVES
        allowed = (4 * torch.finfo(head.weight.dtype).eps if half else 1e-5) * theirs.abs().amax()
        worst = (ours - theirs).abs().amax()
        if not worst <= allowed:
            raise ValueError(
                f"head: its logits are not those of {name}: they differ by {worst:.3g}, allowed {allowed:.3g}; the model "
                "scales, caps or shifts them in another way"
            )
        return head


def as_head(head: LMHead | Tensor, name: str = "head") -> LMHead:
    """`head` itself, or an LMHead around a bare weight tensor."""
    if isinstance(head, Tensor):
        head = LMHead(head)
    if isinstance(head, LMHead):
        if head.num_ids < 1:
            raise ValueError(f"{name}.weight: wanted shape [V, D] with V >= 1, got {list(head.weight.shape)}")
        return head
    raise TypeError(f"{name}: wanted an LMHead or its weight tensor [V, D], got {type(head).__name__}")
