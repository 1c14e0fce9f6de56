"""KV values to the fewer bytes of a codec and back, on whatever device they are on. ``codecs`` has the format.

K has a scale for each channel and V one for each token (KIVI, arXiv:2402.02750, section 3.1): some channels of K are
far larger than the others for every token, and a scale for the token would leave the others few steps. Decoding needs
only the bytes: CPUs and GPUs make the same values of them. Infinite values survive no codec.
"""

import torch

from hexgen2.kv.codecs import head_bytes

_INT8_MAX, _FP8_MAX, _INT4_MAX = 127.0, 448.0, 15.0
#: Smaller scales would have no reciprocal; what is smaller than their steps becomes zero.
_LEAST_SCALE = 2.0**-100
#: e4m3 has a bias of 7 and float16 of 15: e4m3's bits, shifted by 7, are the float16 of the value's 2**8th part.
_FP8_SHIFT, _FP8_RATIO = 7, 2.0**8
_CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}


class Coder:
    """One codec (not "none") for one shape ``[kv_head, 2 (K, V), token, head_dim]``, with its own memory.

    ``encode`` and ``decode`` go between a piece and ``encoded``, ``uint8 [kv_head, codecs.head_bytes]``. On a CPU the
    time of a small piece is that of calling into torch: views are made once, and no call allocates. Not thread-safe.
    """

    def __init__(self, codec: str, num_heads: int, num_tokens: int, head_dim: int, device: torch.device) -> None:
        self.codec = codec
        size = head_bytes(codec, num_tokens, head_dim, "float32")
        self.encoded = torch.zeros(num_heads, size, dtype=torch.uint8, device=device)
        self._values = torch.empty(num_heads, 2, num_tokens, head_dim, device=device)
        self._scaled = torch.empty_like(self._values)
        num_params = head_dim + num_tokens
        self._scales = torch.empty(num_heads, num_params, device=device)
        self._minima = torch.empty_like(self._scales)
        # What follows are views.
        at = 2 * num_params * (2 if codec == "int4" else 1)
        params = self.encoded[:, :at].view(torch.bfloat16)
        self._stored_scales, self._stored_minima = params[:, :num_params], params[:, num_params:]
        shape = (num_tokens, head_dim) if codec == "int4" else (2, num_tokens, head_dim)
        stop = at + num_tokens * head_dim * (1 if codec == "int4" else 2)
        self._codes = self.encoded[:, at:stop].view(_CODES[codec]).view(num_heads, *shape)
        self._k, self._v = self._values.unbind(1)
        self._k_scaled, self._v_scaled = self._scaled.unbind(1)
        # As they broadcast with K and with V, [head, token, head_dim].
        self._k_scale, self._v_scale = self._scales[:, None, :head_dim], self._scales[:, head_dim:, None]
        self._k_minimum, self._v_minimum = self._minima[:, None, :head_dim], self._minima[:, head_dim:, None]

    def encode(self, piece: torch.Tensor) -> None:
        """Fill ``encoded`` from a piece of any floating dtype and strides."""
        self._values.copy_(piece)
        if self.codec == "int4":
            self._encode_int4()
            return
        torch.abs(self._values, out=self._scaled)
        torch.amax(self._k_scaled, 1, keepdim=True, out=self._k_scale)
        torch.amax(self._v_scaled, 2, keepdim=True, out=self._v_scale)
        self._scales.mul_(1 / (_INT8_MAX if self.codec == "int8" else _FP8_MAX))
        self._store_scales()
        self._scales.reciprocal_()
        torch.mul(self._k, self._k_scale, out=self._k_scaled)
        torch.mul(self._v, self._v_scale, out=self._v_scaled)
        if self.codec == "int8":
            self._scaled.round_()
        self._codes.copy_(self._scaled)

    def decode(self, piece: torch.Tensor) -> None:
        """Fill ``piece``, of any floating dtype and strides, from ``encoded``."""
        self._scales.copy_(self._stored_scales)
        if self.codec == "int4":
            self._minima.copy_(self._stored_minima)
            self._k_scaled.copy_(self._codes & 15)
            self._v_scaled.copy_(self._codes >> 4)
            torch.addcmul(self._k_minimum, self._k_scaled, self._k_scale, out=self._k)
            torch.addcmul(self._v_minimum, self._v_scaled, self._v_scale, out=self._v)
            piece.copy_(self._values)
            return
        if self.codec == "fp8":
            # The sign is copied to the bit below it, which is none of the value's.
            bits = self._codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(_FP8_SHIFT).bitwise_and_(~0x4000)
            self._scaled.copy_(bits.view(torch.float16))
            self._scales.mul_(_FP8_RATIO)
        else:
            self._scaled.copy_(self._codes)
        torch.mul(self._k_scaled, self._k_scale, out=self._k)
        torch.mul(self._v_scaled, self._v_scale, out=self._v)
        piece.copy_(self._values)

    def _encode_int4(self) -> None:
        torch.amin(self._k, 1, keepdim=True, out=self._k_minimum)
        torch.amin(self._v, 2, keepdim=True, out=self._v_minimum)
        torch.amax(self._k, 1, keepdim=True, out=self._k_scale)
        torch.amax(self._v, 2, keepdim=True, out=self._v_scale)
        # Steps begin at the minimum as it is stored.
        self._stored_minima.copy_(self._minima)
        self._minima.copy_(self._stored_minima)
        self._scales.sub_(self._minima).mul_(1 / _INT4_MAX)
        self._store_scales()
        self._scales.reciprocal_()
        self._minima.mul_(self._scales).neg_()
        torch.addcmul(self._k_minimum, self._k, self._k_scale, out=self._k_scaled)
        torch.addcmul(self._v_minimum, self._v, self._v_scale, out=self._v_scaled)
        self._scaled.round_().clamp_(0, _INT4_MAX)
        self._codes.copy_(self._k_scaled.add_(self._v_scaled, alpha=16))

    def _store_scales(self) -> None:
        """Write the scales, and go on with them as they are written."""
        self._stored_scales.copy_(self._scales.clamp_min_(_LEAST_SCALE))
        self._scales.copy_(self._stored_scales)
