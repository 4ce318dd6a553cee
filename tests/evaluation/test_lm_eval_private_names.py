"""Private names of lm-eval that hfpretrain/evaluation uses. Each message explains what to do if a name is gone."""

import inspect

import lm_eval.api.metrics
import lm_eval.api.task
from lm_eval.models.huggingface import HFLM


def test_all_token_requests_use_one_private_method():
    message = (
        "HFLM._loglikelihood_tokens has changed: lm_eval_tasks.SharedLanguageModel turns its progress bar off there"
    )
    parameters = inspect.signature(HFLM._loglikelihood_tokens).parameters
    assert list(parameters) == ["self", "requests", "disable_tqdm", "override_bs"], message


def test_tasks_have_their_own_progress_bar():
    message = (
        "lm_eval.api.task.tqdm is gone: lm_eval_tasks.Tasks turns this progress bar off; find where it is created now"
    )
    assert hasattr(lm_eval.api.task, "tqdm"), message


def test_bootstrapping_in_processes_can_be_turned_off():
    message = "lm-eval no longer reads DISABLE_MULTIPROC: Tasks.run must keep it from forking in another way"
    assert 'getenv("DISABLE_MULTIPROC")' in inspect.getsource(lm_eval.api.metrics), message
