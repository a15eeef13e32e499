"""Where sequences come from. A sampler draws from a model's softmax and returns `Samples`."""
from fairseq_earm.sampling.ancestral import AncestralSampler
from fairseq_earm.sampling.search import GeneratorSampler


def build_sampler(cfg, dictionary):
    """The sampler that `earm_cross_entropy`'s flags ask for."""
    lengths = {"max_len_a": cfg.earm_max_len_a, "max_len_b": cfg.earm_max_len_b}
    if cfg.earm_sampler == "ancestral":
        return AncestralSampler(dictionary, bf16=cfg.earm_sampling_bf16, **lengths)
    return GeneratorSampler(
        dictionary,
        topk=cfg.earm_sampling_topk,
        topp=cfg.earm_sampling_topp,
        temperature=cfg.earm_sampling_temperature,
        **lengths,
    )
