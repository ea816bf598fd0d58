"""Linear models of a decoder layer for one token: closed-form and sampled."""

from sdnb.linearize.branches import attention_intercept, attention_matrix, ffn_matrix, stream_operators
from sdnb.linearize.closed_form import closed_form_coefficients, closed_form_fit
from sdnb.linearize.gaussian import gaussian_moments
from sdnb.linearize.layer import LinearLayer, branch_scales, linear_layer, stream_scales
from sdnb.linearize.operator import Operator, dense, product_operator, sum_operator
from sdnb.linearize.sampled import SampledFit, sampled_fit

__all__ = [
    "LinearLayer",
    "Operator",
    "SampledFit",
    "attention_intercept",
    "attention_matrix",
    "branch_scales",
    "closed_form_coefficients",
    "closed_form_fit",
    "dense",
    "ffn_matrix",
    "gaussian_moments",
    "linear_layer",
    "product_operator",
    "sampled_fit",
    "stream_operators",
    "stream_scales",
    "sum_operator",
]
