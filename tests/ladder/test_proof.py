import pytest
from conftest import hfpretrain, small_text, write_jsonl, write_recipe


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_run(folder):
    """The long version: `hfpretrain verify-resume RECIPE --kills 50`, with and without an engine."""
    write_jsonl(folder / "corpus.jsonl", small_text(12))  # several epochs, with other blocks in each
    recipe = write_recipe(folder, model__config__attention_dropout=0.1, data__shift_blocks=True)
    result = hfpretrain("verify-resume", str(recipe), "--steps", "8", "--kills", "1")
    assert result.returncode == 0, result.stderr
    assert "kill 1 (run" in result.stdout and "equal bit for bit" in result.stdout
    assert list(folder.glob("verify-resume-*")) == []


def test_verify_resume_fails_if_a_run_fails(folder):
    recipe = write_recipe(folder)
    result = hfpretrain("verify-resume", str(recipe), "--engine", "nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr
    result = hfpretrain("verify-resume", str(recipe), "--data.sources.0.data_files=nowhere.jsonl")
    assert result.returncode == 2 and "the run ended with exit code 2" in result.stderr
