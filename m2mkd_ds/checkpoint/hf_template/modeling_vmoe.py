"""Vision Mixture-of-Experts (V-MoE) image classifier. Shipped beside the weights; needs torch and transformers only.

    pixel_values -> patches + class token + positions -> blocks (attention, then experts or a dense MLP) -> norm -> head

Trained by module-to-module distillation (m2mKD, arXiv 2402.16918). Names of weights are those of the training code.
Shape letters: B images, C channels, S pixels a side, L tokens an image, D width, H heads, V classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_vmoe import VMoEConfig
from .experts_vmoe import VMoEExperts, VMoELayer
from .routing_vmoe import VMoERouter

# transformers' attention functions by the name that `attn_implementation` picks; "eager" is below.
_ATTENTION = AttentionInterface()


class VMoEPatchEmbed(nn.Module):
    """Images [B, C, S, S] -> patches [B, L-1, D]."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention step by step: [B, H, L, D/H] three times -> ([B, L, H, D/H], weights [B, H, L, L])."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class VMoEAttention(nn.Module):
    """Multi-head self-attention with one fused qkv map. `attn_implementation`: sdpa (torch's kernel, as in training) or eager."""

    is_causal = False  # transformers' functions ask for it

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> (mixed tokens, attention weights [B, H, L, L] or, where the implementation has none to give, None)."""
        b, length, d = x_BLD.shape
        qkv = self.qkv(x_BLD).reshape(b, length, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        name = self.config._attn_implementation
        attend: Callable[..., tuple[Tensor, Tensor | None]] = eager_attention if name == "eager" else _ATTENTION[name]
        # No scaling given: torch's kernel and `eager_attention` both take 1/sqrt(D/H).
        mixed, weights = attend(self, *qkv.unbind(0), None, scaling=None)
        return self.proj(mixed.reshape(b, length, d)), weights


class VMoEMlp(nn.Module):
    """Dense feed-forward network."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class VMoEBlock(GradientCheckpointingLayer):
    """x + attn(norm1(x)), then x + ffn(norm2(x)); returns the balancing loss and the attention weights too."""

    def __init__(self, config: VMoEConfig, is_moe: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = VMoEAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if is_moe:
            self.moe = VMoELayer(config)
        else:
            self.mlp = VMoEMlp(config)
        self.is_moe = is_moe

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        mixed_BLD, attention = self.attn(self.norm1(x_BLD))
        x_BLD = x_BLD + mixed_BLD
        if self.is_moe:
            y_BLD, loss = self.moe(self.norm2(x_BLD))
        else:
            y_BLD, loss = self.mlp(self.norm2(x_BLD)), x_BLD.new_zeros((), dtype=torch.float32)
        return x_BLD + y_BLD, loss, attention


class VMoEStitch(nn.Module):
    """LayerNorm and a linear map between two widths."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.proj(self.norm(x_BLD))


class VMoEPreTrainedModel(PreTrainedModel):
    """What the backbone and the classifier share: every weight but the head's, under the same names, and how it is run."""

    config_class = VMoEConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # forward's **kwargs are for callers of transformers; the loss is the batch's mean, as Trainer must know
    _no_split_modules = ["VMoEBlock"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["router"]  # a list: transformers 5.0 does not see a set

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        d, num_patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        moe_layers = range(config.num_hidden_layers) if config.moe_layers is None else config.moe_layers
        self.patch_embed = VMoEPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, d))
        self.blocks = nn.ModuleList([VMoEBlock(config, i in moe_layers) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        stitches = config.stitches or []
        self.stitches = nn.ModuleDict({str(s["pair"]): nn.ModuleDict() for s in stitches})
        for s in stitches:
            self.stitches[str(s["pair"])][s["kind"]] = VMoEStitch(s["in_dim"], s["out_dim"])  # type: ignore[operator]
        self.stitch_of = {(s["kind"], s["block"]): str(s["pair"]) for s in stitches}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VMoEExperts):
            for weight in (module.up_proj, module.down_proj):
                init.trunc_normal_(weight, std=std)
            for bias in (module.up_proj_bias, module.down_proj_bias):
                init.zeros_(bias)
        elif isinstance(module, VMoERouter) and module.balance_bias is not None:
            init.zeros_(module.balance_bias)
        elif isinstance(module, VMoEPreTrainedModel):
            init.normal_(module.cls_token, std=1e-6)
            init.trunc_normal_(module.pos_embed, std=std)

    def _run_blocks(
        self, pixel_values: Tensor, with_attentions: bool | None, with_hidden_states: bool | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """Images -> (tokens before the last norm [B, L, D], sum of balancing losses, hidden states and attentions if they are wanted).

        Hidden states are the embeddings and every block's output; attentions [B, H, L, L] one a block.
        """
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"this V-MoE takes images of {size} x {size} pixels, given {list(pixel_values.shape)}; use its image processor"
            )
        wants_attentions = self.config.output_attentions if with_attentions is None else with_attentions
        if wants_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager', and this model was loaded with "
                f"{self.config._attn_implementation!r}, which has no weights to give"
            )
        patches_BLD = self.patch_embed(pixel_values)
        x_BLD = torch.cat([self.cls_token.expand(patches_BLD.shape[0], -1, -1), patches_BLD], dim=1) + self.pos_embed
        router_loss = x_BLD.new_zeros((), dtype=torch.float32)
        hidden_states = [x_BLD]
        attentions: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x_BLD, block_loss, attention = block(self._stitch("pre", i, x_BLD))
            x_BLD = self._stitch("post", i, x_BLD)
            router_loss = router_loss + block_loss
            hidden_states.append(x_BLD)
            if wants_attentions:
                attentions.append(attention)
        wants_states = self.config.output_hidden_states if with_hidden_states is None else with_hidden_states
        return x_BLD, router_loss, tuple(hidden_states) if wants_states else None, tuple(attentions) if wants_attentions else None

    def _stitch(self, kind: str, block: int, x_BLD: Tensor) -> Tensor:
        pair = self.stitch_of.get((kind, block))
        return x_BLD if pair is None else self.stitches[pair][kind](x_BLD)  # type: ignore[index]


class VMoEModel(VMoEPreTrainedModel):
    """The backbone: features without the head."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """pixel_values [B, C, S, S] -> last_hidden_state [B, L, D] behind the last norm; pooler_output [B, D] is its class token."""
        x_BLD, _, hidden_states, attentions = self._run_blocks(pixel_values, output_attentions, output_hidden_states)
        features_BLD = self.norm(x_BLD)
        output = BaseModelOutputWithPooling(
            last_hidden_state=features_BLD, pooler_output=features_BLD[:, 0], hidden_states=hidden_states, attentions=attentions
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class VMoEForImageClassification(VMoEPreTrainedModel):
    """The classifier. With `labels` (class ids [B] or probabilities [B, V]) it returns a loss; in training mode the balancing
    losses are part of it."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """pixel_values [B, C, S, S] -> logits [B, V]."""
        x_BLD, router_loss, hidden_states, attentions = self._run_blocks(pixel_values, output_attentions, output_hidden_states)
        logits = self.head(self.norm(x_BLD[:, 0]))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels) + router_loss
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


__all__ = ["VMoEForImageClassification", "VMoEModel", "VMoEPreTrainedModel"]
