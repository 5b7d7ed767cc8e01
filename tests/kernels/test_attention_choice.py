"""Which attention a GPU gets: its capability, torch's word on the backends and the trials are stood in for."""

import re
import sys
import types
import warnings
from collections.abc import Callable

import pytest
import torch

from megatron_aquila.errors import ConfigError
from megatron_aquila.kernels import attention_blocks, blocks, dispatch
from megatron_aquila.kernels.attention import causal_attention, causal_attention_reference
from megatron_aquila.kernels.attention_choice import LONGEST_PLAIN, SDPA_BACKENDS
from megatron_aquila.kernels.dispatch import IMPLEMENTATIONS, choose_kernels
from megatron_aquila.kernels.documents import Documents
from megatron_aquila.kernels.scores import Scores, alibi_slopes
from megatron_aquila.kernels.self_check import Sizes, why_refused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, AMPERE, BLACKWELL = (9, 0), (8, 0), (10, 0)
QUERIES = {
    "sdpa_cudnn": "can_use_cudnn_attention",
    "sdpa_flash": "can_use_flash_attention",
    "sdpa_efficient": "can_use_efficient_attention",
}
MODULES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}


def flash_attn_func(q, k, v, causal=False):
    raise AssertionError("only looked at")


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False
):
    raise AssertionError("only looked at")


class Gpu:
    """A GPU that runs everything; what it does not can be taken away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.tried, self.asked = monkeypatch, list[str](), list[object]()
        self.errors: dict[str, str] = {}
        self.capability(HOPPER)
        for module in ("triton", *MODULES.values()):
            monkeypatch.setitem(sys.modules, module, None)
        for name in QUERIES:
            self.backend(name, True)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, device, dtype: empty(*shape, dtype=dtype))
        monkeypatch.setattr(dispatch, "why_refused", self.trial)

    def trial(self, op: str, kernel: Callable, *, device, dtype, sizes: Sizes) -> str | None:
        (name,) = (name for name, other in IMPLEMENTATIONS[op].items() if other is kernel)
        self.tried.append(name)
        return self.errors.get(name)

    def capability(self, capability: tuple[int, int]) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def backend(self, name: str, can_use: bool, *whys: str) -> None:
        def query(asked: object, debug: bool) -> bool:
            assert debug
            self.asked.append(asked)
            for why in whys:
                warnings.warn(why, UserWarning, stacklevel=1)
            return can_use

        self.patch.setattr(torch.backends.cuda, QUERIES[name], query)

    def install(self, name: str, **functions: object) -> None:
        module = types.ModuleType(MODULES[name])
        vars(module).update(
            {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func, **functions}
        )
        self.patch.setitem(sys.modules, MODULES[name], module)
        if name == "flash_attn_4" and sys.modules["flash_attn"] is None:
            self.patch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))

    def chosen(self, dtype: torch.dtype = torch.bfloat16, forced: str | None = None, **sizes) -> str:
        """The attention and its reason, where it is the one that was tried last."""
        asked = {} if forced is None else {"attention": forced}
        kernels = choose_kernels(CUDA, dtype, forced=asked, sizes=Sizes(**sizes))
        name = kernels.reasons["attention"].partition(":")[0]
        assert kernels.attention is IMPLEMENTATIONS["attention"][name]
        assert name == "reference" or self.tried[-1] == name
        return kernels.reasons["attention"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_hopper_and_later_take_cudnn_whatever_is_installed(gpu: Gpu) -> None:
    for name in MODULES:
        gpu.install(name)
    assert gpu.chosen() == "sdpa_cudnn: the fastest from Hopper on"
    gpu.capability(BLACKWELL)
    assert gpu.chosen(torch.float16) == "sdpa_cudnn: the fastest from Hopper on"


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (HOPPER, ["flash_attn", "flash_attn_3", "flash_attn_4"], "flash_attn_3"),
        (HOPPER, ["flash_attn", "flash_attn_4"], "flash_attn_4"),
        (BLACKWELL, ["flash_attn", "flash_attn_3", "flash_attn_4"], "flash_attn_4"),
        (HOPPER, ["flash_attn"], "flash_attn"),
        (HOPPER, [], "sdpa_flash"),
        (AMPERE, ["flash_attn", "flash_attn_3", "flash_attn_4"], "flash_attn"),
        (AMPERE, [], "sdpa_flash"),
    ],
)
def test_documents_take_a_varlen_kernel(gpu: Gpu, capability, installed: list[str], expected: str) -> None:
    gpu.capability(capability)
    for name in installed:
        gpu.install(name)
    assert gpu.chosen(has_documents=True).partition(":")[0] == expected
    if capability is AMPERE:
        assert gpu.chosen().partition(":")[0] == expected, "it does without documents what it does with them"


def test_what_torch_refuses_is_passed_over_loudly_in_its_words(gpu: Gpu) -> None:
    gpu.backend("sdpa_cudnn", False, "cuDNN wants\n a longer life. (Triggered internally at sdp.cpp:1)", "And more.")
    why = "attention=sdpa_cudnn is refused, cuDNN wants a longer life; And more"
    with pytest.warns(RuntimeWarning, match=f"kernels: {why}; attention=sdpa_flash runs instead"):
        reason = gpu.chosen()
    assert reason.startswith(f"sdpa_flash: {why}; ")
    gpu.backend("sdpa_cudnn", False)
    with pytest.raises(ConfigError, match=r"--kernels attention=sdpa_cudnn: .*torch does not say why; leave it out"):
        gpu.chosen(forced="sdpa_cudnn")


def test_torch_is_asked_about_the_runs_own_shape(gpu: Gpu) -> None:
    gpu.chosen(seq_len=40, num_heads=6, num_kv_heads=3, head_dim=24)
    (asked,) = gpu.asked
    assert (tuple(asked.query.shape), tuple(asked.key.shape)) == ((1, 6, 40, 24), (1, 3, 40, 24))
    assert (asked.is_causal, asked.enable_gqa, asked.query.requires_grad) == (True, True, True)


def test_one_that_errs_is_passed_over_loudly(gpu: Gpu) -> None:
    gpu.errors["sdpa_cudnn"] = "the gradient of q is wrong"
    with pytest.warns(RuntimeWarning, match="attention=sdpa_cudnn is refused, here it does not do what its reference"):
        assert gpu.chosen().startswith("sdpa_flash: attention=sdpa_cudnn is refused, ")
    with pytest.raises(ConfigError, match=r"--kernels attention=sdpa_cudnn: .*gradient of q is wrong; leave it out"):
        gpu.chosen(forced="sdpa_cudnn")


def test_float32_takes_the_one_that_does(gpu: Gpu) -> None:
    assert gpu.chosen(torch.float32).startswith("sdpa_efficient: cuDNN's attention has no float32; ")
    assert (gpu.asked[-1].key.shape[1], gpu.asked[-1].enable_gqa) == (4, False), "its heads are repeated"


def test_the_plain_one_is_only_for_short_samples(gpu: Gpu) -> None:
    assert gpu.chosen(torch.float64, seq_len=LONGEST_PLAIN).startswith("reference: cuDNN's attention has no float64")
    why = f"it holds the scores of all pairs of {LONGEST_PLAIN + 1} tokens"
    with pytest.raises(ConfigError) as error:
        gpu.chosen(torch.float64, seq_len=LONGEST_PLAIN + 1)
    assert str(error.value).startswith(f"--seq-len {LONGEST_PLAIN + 1}: no attention kernel runs on cuda: ")
    assert why in str(error.value)
    assert str(error.value).endswith(f"; use --precision bf16, or samples of at most {LONGEST_PLAIN} tokens")
    with pytest.raises(ConfigError, match=f"--kernels attention=reference: .*{why}"):
        choose_kernels(CPU, torch.float32, forced={"attention": "reference"}, sizes=Sizes(seq_len=LONGEST_PLAIN + 1))


def test_what_is_asked_for_is_tried_too(gpu: Gpu) -> None:
    for name in MODULES:
        gpu.install(name)
    for name in IMPLEMENTATIONS["attention"]:
        assert gpu.chosen(forced=name) == f"{name}: asked for"
    assert set(gpu.tried) == {*IMPLEMENTATIONS["attention"]} - {"reference"}


def test_a_package_of_another_version_is_not_used(gpu: Gpu) -> None:
    gpu.install("flash_attn_4", flash_attn_varlen_func=lambda q, k, v, cu_seqlens_q, cu_seqlens_k, causal: None)
    why = "flash attention 4 is of another version: flash_attn_varlen_func does not take max_seqlen_q max_seqlen_k"
    with pytest.raises(ConfigError) as error:
        gpu.chosen(forced="flash_attn_4")
    assert str(error.value).startswith(f"--kernels attention=flash_attn_4: {why}; ")


@pytest.mark.parametrize("name", [*SDPA_BACKENDS, *MODULES])
def test_on_a_cpu_none_of_them_can_be_had(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--kernels attention={name}: .* needs a GPU"):
        choose_kernels(CPU, torch.bfloat16, forced={"attention": name})


SIZES = {"head_dim": 32, "num_heads": 6, "num_kv_heads": 2, "seq_len": 100}


@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_right_attention_passes_the_trial(has_documents: bool, dtype: torch.dtype) -> None:
    sizes = Sizes(**SIZES, has_documents=has_documents)
    assert why_refused("attention", causal_attention, device=CPU, dtype=dtype, sizes=sizes) is None


def narrow(q, k, v, documents):
    """Weights, scores' gradients and each head's of k and v are rounded, as on a GPU: torch's own for CPUs."""
    heads = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_kv_heads"),
    [(torch.float16, 32, 8), *((torch.bfloat16, *heads) for heads in ((32, 32), (48, 8), (32, 8), (64, 8), (64, 1)))],
)
def test_kernels_that_multiply_in_half_precision_pass(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    """At heads of real models: of millions of gradients the worst is far worse than that of a small one."""
    sizes = Sizes(head_dim=128, num_heads=num_heads, num_kv_heads=num_kv_heads, seq_len=48)
    assert why_refused("attention", narrow, device=CPU, dtype=dtype, sizes=sizes) is None


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 32), (32, 8)])
def test_half_precision_passes_by_blocks(num_heads: int, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "multiplies_widened", lambda x: False)
    sizes = Sizes(head_dim=128, num_heads=num_heads, num_kv_heads=num_kv_heads, seq_len=48, by_blocks=True)
    assert why_refused("attention", blocks.BLOCKS_CPU, device=CPU, dtype=torch.bfloat16, sizes=sizes) is None


@pytest.mark.parametrize(
    "scores", [Scores(slopes=alibi_slopes(40)), Scores(clamp=50.0), Scores(clamp=1.0)], ids=["slopes", "50", "1"]
)
def test_half_precision_passes_where_scores_change(scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operands that it rounds on a GPU, summed as there."""
    product = attention_blocks._product
    monkeypatch.setattr(attention_blocks, "_narrow", lambda x: x.dtype)
    monkeypatch.setattr(attention_blocks, "_product", lambda a, b: product(a.float(), b.float()))
    sizes = Sizes(head_dim=128, num_heads=40, num_kv_heads=40, seq_len=48, scores=scores)
    kernel = attention_blocks.SCORE_BLOCKS
    assert why_refused("attention", kernel, device=CPU, dtype=torch.bfloat16, sizes=sizes) is None


def sees_the_next_token(q, k, v, documents):
    return torch.cat([causal_attention_reference(q, k, v, documents)[1:], v[-1:].repeat_interleave(3, 2)])


def other_heads(q, k, v, documents):
    return causal_attention_reference(q, k.roll(1, 2), v, documents)


def no_documents(q, k, v, documents):
    return causal_attention_reference(q, k, v)


def documents_one_off(q, k, v, documents):
    bounds = [0, *(bound + 1 for bound in documents.bounds[1:-1]), documents.bounds[-1]]
    return causal_attention_reference(q, k, v, Documents(tuple(bounds), torch.tensor(bounds, dtype=torch.int32)))


def unscaled(q, k, v, documents):
    return causal_attention_reference(q * 1.1, k, v, documents)


def wrong_gradient(q, k, v, documents):
    return causal_attention_reference(q, (k + k.detach()) / 2, v, documents)


@pytest.mark.parametrize(
    "wrong", [sees_the_next_token, other_heads, no_documents, documents_one_off, unscaled, wrong_gradient]
)
def test_wrong_attention_does_not(wrong) -> None:
    """In bfloat16, whose bounds are the widest, and beyond them by more than another draw would change."""
    sizes = Sizes(**SIZES, has_documents=True)
    why = why_refused("attention", wrong, device=CPU, dtype=torch.bfloat16, sizes=sizes)
    assert why is not None
    assert float(re.search("by ([0-9.]+) times", why)[1]) > 2, why


def test_one_head_of_one_token_shows() -> None:
    """Which is little of all errors together."""

    def forgets(q, k, v, documents):
        keep = torch.ones(*q.shape[:3], 1, dtype=q.dtype)
        keep[70, 1, 3] = 0
        return causal_attention_reference(q, k, v, documents) * keep

    why = why_refused("attention", forgets, device=CPU, dtype=torch.bfloat16, sizes=Sizes(**SIZES))
    assert why is not None
    assert re.match("the output is wrong in [0-9]+ of 38400 places, by [1-3]", why), why


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(32, 32), (48, 8)])
def test_a_gpu_has_a_fused_one_at_aquilas_sizes(num_heads: int, num_kv_heads: int, has_documents: bool) -> None:
    sizes = Sizes(
        head_dim=128, num_heads=num_heads, num_kv_heads=num_kv_heads, seq_len=4096, has_documents=has_documents
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first that is installed is not refused
        choose_kernels(CUDA, torch.bfloat16, sizes=sizes)
    hopper = torch.cuda.get_device_capability()[0] == 9
    if hopper and not has_documents:
        assert choose_kernels(CUDA, torch.bfloat16, sizes=sizes).reasons["attention"].startswith("sdpa_cudnn: ")


def test_scores_that_change_have_a_kernel_of_their_own() -> None:
    sizes = Sizes(scores=Scores(clamp=1.0), seq_len=4096)
    assert choose_kernels(CPU, torch.float32, sizes=sizes).reasons["attention"].startswith("score_blocks: the only one")
    with pytest.raises(ConfigError, match=r"--kernels attention=sdpa: .*neither biases nor clamps"):
        choose_kernels(CPU, torch.float32, forced={"attention": "sdpa"}, sizes=sizes)
