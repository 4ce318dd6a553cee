"""Private names of lm-eval that hfpretrain/evaluation uses. Each message says what to do without them."""

import inspect

import lm_eval.api.metrics
import lm_eval.api.task
from lm_eval.models.huggingface import HFLM


def test_requests_of_tokens_go_through_one_method():
    message = (
        "HFLM._loglikelihood_tokens has changed: lm_eval_tasks.SharedLanguageModel turns its progress bar off there"
    )
    parameters = inspect.signature(HFLM._loglikelihood_tokens).parameters
    assert list(parameters) == ["self", "requests", "disable_tqdm", "override_bs"], message


def test_tasks_have_a_progress_bar_of_their_own():
    message = "lm_eval.api.task.tqdm is gone: lm_eval_tasks.Tasks turns this bar off; find where it is made now"
    assert hasattr(lm_eval.api.task, "tqdm"), message


def test_bootstrapping_in_processes_can_be_turned_off():
    message = "lm-eval no longer reads DISABLE_MULTIPROC: Tasks.run must keep it from forking in another way"
    assert 'getenv("DISABLE_MULTIPROC")' in inspect.getsource(lm_eval.api.metrics), message
