"""Configuration of an exported Vision Mixture-of-Experts (V-MoE) image classifier. Shipped beside the weights; needs transformers only."""

from typing import Any

from transformers import PreTrainedConfig


class VMoEConfig(PreTrainedConfig):
    """Shapes and routing of a V-MoE. Every field is written to config.json; defaults are those of V-MoE-Base."""

    model_type = "m2mkd_vmoe"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # Numbers of the blocks with experts, ascending; the others have a dense MLP.
    moe_layers: list[int] | None = None
    num_experts: int = 8
    # Nonlinearity of the experts: "gelu" (exact), or "swiglu", whose up_proj holds gate and value, gate first.
    expert_activation: str = "gelu"
    # "topk": the best experts of each token. "noisy_topk": the same, with noise on the logits in training mode.
    # "expert_choice": each expert takes its best tokens of the batch.
    router_kind: str = "topk"
    # Experts a token (not used by expert_choice).
    router_top_k: int = 2
    # "after": softmax over the kept logits. "before": softmax over all experts, then top-k.
    router_softmax: str = "after"
    # With "before": divide the kept weights by their sum.
    router_renormalize: bool = False
    router_bias: bool = True
    # Standard deviation of noisy_topk's noise, times the number of experts.
    router_noise: float = 1.0
    # Weights of the balancing losses that are added to the loss in training mode: CV^2 of importance, CV^2 of load, Switch, z-loss.
    router_importance_weight: float = 0.0
    router_load_weight: float = 0.0
    router_switch_weight: float = 0.0
    router_z_weight: float = 0.0
    # An expert takes at most ceil(tokens * top_k * factor / experts) tokens of a batch (rounded up to a multiple), in training and in
    # evaluation mode; 0: no bound. With a bound, an image's logits depend on the other images of its batch.
    # expert_choice: exactly ceil(tokens * factor / experts); evaluation factor 0 means as in training.
    router_capacity_factor: float = 0.0
    router_eval_capacity_factor: float = 0.0
    router_capacity_multiple: int = 1
    # Who is served first: "order" of the tokens, or "batch": the tokens with the largest weight.
    router_capacity_priority: str = "order"
    # Above 0: the weights hold a bias per expert that moves the choice only. Its step in training; not moved here.
    router_balance_rate: float = 0.0
    # Of a benchmark router that is never exported; kept so that the training configuration is complete.
    router_zipf_exponent: float = 1.0
    # "grouped": torch's grouped matmul. "loop": one expert after the other; reads the rows' numbers, which waits for a GPU.
    # "dense": every expert computes all rows, and the others' are thrown away: no shape depends on the data, for compilers that need
    # that. "auto": grouped where it can run (compiled in float32 it cannot), else the loop. In float32 on a CPU the first two give the
    # same bits.
    expert_backend: str = "auto"
    # Kept stitch layers (LayerNorm + Linear): [{"pair", "kind": "pre"|"post", "block", "in_dim", "out_dim"}].
    stitches: list[dict[str, Any]] | None = None


__all__ = ["VMoEConfig"]
