"""Each metric once, tested against a closed form; what a paper's own code computed under the same name is in `as_published`."""
from .activity import active_units, activity, reencoding_error
from .as_published import ap_active_units, ap_density_coverage, ap_mi, ap_mi_ceiling, ap_nll
from .evaluate import evaluate
from .information import MutualInformation, aggregate_kl, gaussian_upper, mutual_information, mutual_posterior_divergence, pairwise_bounds, surgery
from .latent import Search, latent_search, picture_sheet, traverse, walk
from .likelihood import AIS, AdaptiveNLL, LinearGaussian, decoder_use_gap, fit_prior, neg_elbo_parts, nll_ais, nll_iw, nll_iw_adaptive, nll_iw_adaptive_all, nll_iw_all, standard_error
from .probes import few_label_accuracy, linear_probe
from .samples import PCAFeatures, ball_counts, density_coverage, expected_coverage, features, prdc, precision_recall, real_ceiling
from .text import corpus_perplexity, distinct, generation_row, length_r2, ngram_overlap, perplexity, token_entropy

__all__ = ["AIS", "AdaptiveNLL", "MutualInformation", "LinearGaussian", "PCAFeatures", "active_units", "activity", "aggregate_kl", "ap_active_units", "ap_density_coverage",
           "ap_mi", "ap_mi_ceiling", "ap_nll", "ball_counts", "decoder_use_gap", "density_coverage", "evaluate", "expected_coverage", "features",
           "fit_prior", "gaussian_upper", "mutual_information", "mutual_posterior_divergence", "neg_elbo_parts", "nll_ais", "nll_iw", "nll_iw_adaptive", "nll_iw_adaptive_all", "nll_iw_all", "pairwise_bounds", "prdc", "precision_recall", "real_ceiling",
           "reencoding_error", "standard_error", "surgery", "Search", "latent_search", "picture_sheet", "traverse", "walk",
           "corpus_perplexity", "distinct", "few_label_accuracy", "generation_row", "length_r2", "linear_probe", "ngram_overlap", "perplexity", "token_entropy"]
