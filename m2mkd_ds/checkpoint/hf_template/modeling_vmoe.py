"""Vision Mixture-of-Experts (V-MoE) image classifier. Shipped beside the weights; needs torch and transformers only.

    pixel_values -> patches + class token + positions -> blocks (attention, then experts or a dense MLP) -> norm -> head

Trained by module-to-module distillation (m2mKD, arXiv 2402.16918). Names of weights are those of the training code.
Shape letters: B images, L tokens an image, T = B*L tokens, D width, F expert hidden width, E experts, K experts a token, R <= T*K rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

from .configuration_vmoe import VMoEConfig
from .routing_vmoe import VMoERouter


class VMoEPatchEmbed(nn.Module):
    """Images [B, C, S, S] -> patches [B, L-1, D]."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class VMoEAttention(nn.Module):
    """Multi-head self-attention with one fused qkv map, always through torch's scaled_dot_product_attention."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, length, d = x_BLD.shape
        qkv = self.qkv(x_BLD).reshape(b, length, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed.transpose(1, 2).reshape(b, length, d))


class VMoEMlp(nn.Module):
    """Dense feed-forward network."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class VMoEExperts(nn.Module):
    """E two-layer networks, stacked [E, out, in]: exact GELU, or SwiGLU with the gate in the first half of up_proj."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        e, d = config.num_experts, config.hidden_size
        hidden = int(d * config.mlp_ratio)
        if config.expert_activation not in ("gelu", "swiglu"):
            raise ValueError(f"expert_activation is {config.expert_activation!r}; allowed is gelu or swiglu")
        self.activation = config.expert_activation
        self.backend = config.expert_backend
        up_width = 2 * hidden if self.activation == "swiglu" else hidden
        self.up_proj = nn.Parameter(torch.empty(e, up_width, d))
        self.up_proj_bias = nn.Parameter(torch.empty(e, up_width))
        self.down_proj = nn.Parameter(torch.empty(e, d, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(e, d))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, max_rows: int | None) -> Tensor:
        """Weighted sum of each token's experts; id E stands for no expert, and at most `max_rows` ids are less (None: all are)."""
        device_type = x_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)  # torch's grouped matmul does not see autocast
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.up_proj.dtype
        # 1. Rows in the order of their experts. 2. Both layers. 3. Back to tokens, weighted, choice 0 first.
        num_experts = self.up_proj.shape[0]
        sorted_N, order_N = ids_TK.reshape(-1).sort(stable=True)
        ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device), right=True)
        experts_R, order_R = sorted_N[:max_rows].clamp(max=num_experts - 1), order_N[:max_rows]
        # Rows at the end may be nobody's.
        owned_R1 = None if max_rows is None else torch.arange(len(order_R), device=order_R.device)[:, None] < ends_E[-1]
        layout = (experts_R, ends_E, owned_R1, self._use_grouped(dtype))
        rows = x_TD.to(dtype).index_select(0, order_R // ids_TK.shape[1])
        rows = self._activate(self._linear(rows, self.up_proj.to(dtype), self.up_proj_bias.to(dtype), *layout))
        rows = self._linear(rows, self.down_proj.to(dtype), self.down_proj_bias.to(dtype), *layout)
        kept_TK, rows_TK = ids_TK < num_experts, order_N.argsort().view_as(ids_TK)
        rows_TKD = rows.index_select(0, torch.where(kept_TK, rows_TK, 0).reshape(-1)).view(*ids_TK.shape, x_TD.shape[1])
        rows_TKD = torch.where(kept_TK[..., None], rows_TKD, 0)
        total_TD = rows_TKD[:, 0] * weights_TK[:, 0, None]
        for k in range(1, ids_TK.shape[1]):
            total_TD = total_TD + rows_TKD[:, k] * weights_TK[:, k, None]
        return total_TD.to(dtype)

    def _activate(self, up: Tensor) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(up)
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate) * value

    @staticmethod
    def _linear(
        rows: Tensor, weight: Tensor, bias: Tensor, experts_R: Tensor, ends: Tensor, owned_R1: Tensor | None, grouped: bool
    ) -> Tensor:
        """Each row times its expert's weight^T, plus its expert's bias; zero for nobody's rows."""
        if not grouped:
            stops = ends.tolist()
            pieces = zip([0, *stops[:-1]], stops, weight.unbind(0), bias.unbind(0), strict=True)
            owned = torch.cat([rows[start:stop] @ w.t() + b for start, stop, w, b in pieces])
            return F.pad(owned, (0, 0, 0, len(rows) - stops[-1]))
        # The operator leaves nobody's rows uninitialised, forward and backward: masks on both sides keep NaN out.
        rows = rows if owned_R1 is None else torch.where(owned_R1, rows, 0)
        out = _grouped_mm()(rows, weight.transpose(-2, -1), offs=ends.to(torch.int32)) + bias[experts_R]
        return out if owned_R1 is None else torch.where(owned_R1, out, 0)

    def _use_grouped(self, dtype: torch.dtype) -> bool:
        if self.backend not in ("auto", "grouped", "loop"):
            raise ValueError(f"expert_backend is {self.backend!r}; allowed is auto, grouped or loop")
        if self.backend == "loop":
            return False
        _, d, hidden = self.down_proj.shape
        multiple = 16 // dtype.itemsize  # every stride must be a multiple of 16 bytes
        device = self.up_proj.device
        able = (
            _grouped_mm() is not None
            and dtype in (torch.float32, torch.bfloat16, torch.float16)
            and d % multiple == 0
            and hidden % multiple == 0
            and (device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)))
        )
        if self.backend == "grouped" and not able:
            raise ValueError(f"expert_backend=grouped cannot run for {dtype} on {device} with widths {d} and {hidden}; use loop")
        return able


def _grouped_mm():  # type: ignore[no-untyped-def]
    """torch's operator under its public or its older private name."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class VMoELayer(nn.Module):
    """Router and experts."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.router = VMoERouter(config)
        self.experts = VMoEExperts(config)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        ids_TK, weights_TK, max_rows, loss = self.router(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK, max_rows).view(x_BLD.shape), loss


class VMoEBlock(nn.Module):
    """x + attn(norm1(x)), then x + ffn(norm2(x)); returns the balancing loss too."""

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

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        if self.is_moe:
            y_BLD, loss = self.moe(self.norm2(x_BLD))
        else:
            y_BLD, loss = self.mlp(self.norm2(x_BLD)), x_BLD.new_zeros((), dtype=torch.float32)
        return x_BLD + y_BLD, loss


class VMoEStitch(nn.Module):
    """LayerNorm and a linear map between two widths."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.proj(self.norm(x_BLD))


class VMoEForImageClassification(PreTrainedModel):
    """The classifier. With `labels` (class ids [B] or probabilities [B, V]) it returns a loss; in training mode the balancing
    losses are part of it."""

    config_class = VMoEConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _no_split_modules = ["VMoEBlock"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = {"router"}

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        d, num_patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        moe_layers = range(config.num_hidden_layers) if config.moe_layers is None else config.moe_layers
        self.patch_embed = VMoEPatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, d))
        self.blocks = nn.ModuleList([VMoEBlock(config, i in moe_layers) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.head = nn.Linear(d, config.num_labels)  # type: ignore[arg-type]
        stitches = config.stitches or []
        self.stitches = nn.ModuleDict({str(s["pair"]): nn.ModuleDict() for s in stitches})
        for s in stitches:
            self.stitches[str(s["pair"])][s["kind"]] = VMoEStitch(s["in_dim"], s["out_dim"])  # type: ignore[operator]
        self.stitch_of = {(s["kind"], s["block"]): str(s["pair"]) for s in stitches}
        self.post_init()

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
        elif isinstance(module, VMoEForImageClassification):
            init.normal_(module.cls_token, std=1e-6)
            init.trunc_normal_(module.pos_embed, std=std)

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: object,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """pixel_values [B, C, S, S] -> logits [B, V]."""
        size = self.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"this V-MoE takes images of {size} x {size} pixels, given {list(pixel_values.shape)}; use its image processor"
            )
        patches_BLD = self.patch_embed(pixel_values.to(self.patch_embed.proj.weight.dtype))
        x_BLD = torch.cat([self.cls_token.expand(patches_BLD.shape[0], -1, -1), patches_BLD], dim=1) + self.pos_embed
        hidden_states, router_loss = [x_BLD], x_BLD.new_zeros((), dtype=torch.float32)
        for i, block in enumerate(self.blocks):
            x_BLD, block_loss = block(self._stitch("pre", i, x_BLD))
            x_BLD = self._stitch("post", i, x_BLD)
            router_loss = router_loss + block_loss
            hidden_states.append(x_BLD)
        logits = self.head(self.norm(x_BLD[:, 0]))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels) + router_loss
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=tuple(hidden_states) if wanted else None)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _stitch(self, kind: str, block: int, x_BLD: Tensor) -> Tensor:
        pair = self.stitch_of.get((kind, block))
        return x_BLD if pair is None else self.stitches[pair][kind](x_BLD)  # type: ignore[index]


__all__ = ["VMoEForImageClassification"]
