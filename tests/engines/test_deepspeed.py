import pytest
import torch

from hfpretrain.engines import choose, deepspeed
from hfpretrain.recipe.schema import RecipeError


def test_deepspeed_on_a_cpu_says_which_tool_it_misses(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError, match="needs ninja on the PATH: `pip install ninja`"):
        deepspeed.require_compiler()
    (tmp_path / "ninja").touch(0o755)
    # Before any process group: this is where a training gets its accelerator.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"no C\+\+ compiler 'c\+\+': install g\+\+"):
        choose.build_engine("no", [], str(tmp_path), 60)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    deepspeed.require_compiler()
