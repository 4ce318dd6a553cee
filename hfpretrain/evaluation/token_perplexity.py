"""Perplexity and bits per byte from summed token losses, as a metric of `evaluate`.

Load it with `evaluate.load(hfpretrain.evaluation.token_perplexity.__file__)`.
"""

import math

import datasets
import evaluate

from hfpretrain.evaluation.sums import perplexity_figures

_DESCRIPTION = (
    "Token-weighted loss, perplexity and bits per byte of a language model. Unlike the Hub's `perplexity`, which "
    "averages the perplexities of texts, this is exp of the mean loss over all tokens."
)
_INPUTS = """
Args:
    nll: sums of negative log-likelihoods in nats, one for each batch (float64).
    tokens: number of predicted tokens in each sum.
    content_nll: the part of `nll` that comes from tokens which are text, not special tokens (float64).
    bytes: UTF-8 bytes of the text of those tokens.
Returns:
    loss: nats per predicted token.
    perplexity: exp(loss).
    bits_per_byte: content_nll / (bytes * ln 2); comparable across tokenizers.
"""


class TokenPerplexity(evaluate.Metric):
    """Divides sums over tokens. Sums of several processes are added first. For inputs and outputs see `_INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "nll": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "content_nll": datasets.Value("float64"),
                    "bytes": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, nll: list[float], tokens: list[int], content_nll: list[float], bytes: list[float]
    ) -> dict[str, float]:
        return perplexity_figures(math.fsum(nll), sum(tokens), math.fsum(content_nll), math.fsum(bytes))
