import pytest
import torch

from hfpretrain.engines import choose, deepspeed
from hfpretrain.recipe.schema import RecipeError


def test_deepspeed_on_a_cpu_is_refused_without_ninja_or_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError, match="ninja"):
        deepspeed.require_compiler()
    (tmp_path / "ninja").touch(0o755)
    # A training builds its accelerator like this, before there is any process group.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"C\+\+ compiler"):
        choose.build_engine("no", [], str(tmp_path), 60)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    deepspeed.require_compiler()
