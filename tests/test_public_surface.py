"""What `import kvcompress` gives, and that it changes nothing until a cache is made."""

from __future__ import annotations

import subprocess
import sys

import torch
from transformers import AttentionInterface, DynamicCache

import kvcompress
from tests import tiny

NAMES = {
    "ALLOCATORS",
    "EVICTORS",
    "MERGERS",
    "QUANTIZERS",
    "REDUCERS",
    "SCORERS",
    "Budget",
    "CacheReport",
    "Chat",
    "CompressedCache",
    "CompressionConfig",
    "Document",
    "KVCompressError",
    "compressing",
    "restore",
}


def test_the_public_names_are_these() -> None:
    assert set(kvcompress.__all__) == NAMES
    assert all(hasattr(kvcompress, name) for name in NAMES)


def test_every_error_is_also_a_builtin() -> None:
    for name, error in vars(kvcompress.errors).items():
        if isinstance(error, type) and issubclass(error, kvcompress.KVCompressError):
            builtin = [base for base in error.__mro__ if base.__module__ == "builtins" and base is not object]
            assert error is kvcompress.KVCompressError or builtin[0] is not Exception, name


def test_importing_changes_nothing_global() -> None:
    program = """
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface
def state():
    return (sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping),
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
            transformers.logging.get_verbosity())
before = state()
import kvcompress
assert state() == before, (before, state())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_and_wrong_names_need_neither_torch_nor_transformers() -> None:
    program = """
import sys
import kvcompress
from kvcompress.cli import app
from typer.testing import CliRunner
assert kvcompress.__version__ in CliRunner().invoke(app, ["--version"]).stdout
assert CliRunner().invoke(app, ["nonsense"]).exit_code == 2
assert not {"torch", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
assert set(kvcompress.__all__) <= set(dir(kvcompress))
kvcompress.errors.KVCompressError
try:
    kvcompress.nonsense
except AttributeError:
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_the_kit_of_laws_is_imported_when_it_is_asked_for() -> None:
    """Neither the package nor the pytest plug-in brings Hypothesis; without it, the error says what to install."""
    program = """
import sys
import kvcompress, kvcompress.cache, kvcompress.config, kvcompress.evaluation, kvcompress.reuse, kvcompress.testing
assert not {"hypothesis", "pytest", "_pytest"} & set(sys.modules)
import kvcompress.testing.plugin
assert "hypothesis" not in sys.modules
assert "check_allocator" in dir(kvcompress.testing)
sys.modules["hypothesis"] = None
try:
    kvcompress.testing.check_allocator
except kvcompress.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    told = "kvcompress.testing: needs hypothesis; install it with: pip install 'kvcompress[testing]'\n"
    assert done.stdout == told, done.stderr


def test_restore_takes_everything_off_a_model() -> None:
    model, fresh = tiny.build("llava"), tiny.build("llava")
    modules = {name: set(module.__dict__) for name, module in model.named_modules()}
    kvcompress.CompressedCache(model, "prefixkv")
    assert model.get_decoder().config._attn_implementation == "kvcompress"
    assert model.model.vision_tower.config._attn_implementation == fresh.model.vision_tower.config._attn_implementation
    kvcompress.restore(model)
    kvcompress.restore(model)  # twice is once
    assert model.get_decoder().config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == modules


@torch.no_grad()
def test_a_touched_model_serves_every_other_attention_as_before() -> None:
    inputs = tiny.inputs("llama", 12, seed=3, batch=2)
    inputs["attention_mask"][0, :4] = 0
    for before in ("sdpa", "eager"):
        model = tiny.build("llama")
        model.set_attn_implementation(before)
        expected = [
            model(**inputs).logits,
            model(**inputs, **tiny.with_cache(DynamicCache(config=model.config))).logits,
        ]
        kvcompress.CompressedCache(model, "prefixkv")
        found = [model(**inputs).logits, model(**inputs, **tiny.with_cache(DynamicCache(config=model.config))).logits]
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one[inputs["attention_mask"].bool()], other[inputs["attention_mask"].bool()])
        kvcompress.restore(model)
        assert model.config._attn_implementation == before


def test_a_saved_model_knows_nothing_of_kvcompress(tmp_path) -> None:
    model = tiny.build("llama")
    kvcompress.CompressedCache(model, "prefixkv")
    model.save_pretrained(tmp_path)
    assert "kvcompress" not in (tmp_path / "config.json").read_text()
    assert "kvcompress" in AttentionInterface._global_mapping
