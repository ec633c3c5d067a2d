"""Code shared by the Triton kernels; requires triton, so it is imported lazily.

Names have the same meaning in all kernels.

Axes are letters. A tile has `M` rows and `N` columns, and a matmul sums along `K`; `E` are experts
(or the buckets that rows are sorted into), `R` the columns of a low-rank factor, `C` the parts of a
sum that is split among programs. The router has `T` tokens, `E` experts, `G` groups and `K`
choices.

==================  ================================================================================
name                what it is
==================  ================================================================================
`x_ptr`             address of the first element of a tensor, an argument
`x_source`          the same, or a tensor descriptor, depending on `X_FORM`; see `descriptors.py`
`x_ptrs`            addresses of a block
`x_place`           addresses of a block, or its first index in a descriptor
`stride_x_m`        stride of a tensor along an axis
`num_rows`          a count; `width`, `height` and `inner` are sizes along `N`, `M`, `K`
`pid_m`, `tile_m`   index of a program or tile along an axis; `tile` is the index over all axes
`offs_m`            indices along an axis, one for each element of the block
`start_m`           the first of them, in a loop over blocks
`mask_m`            which of these indices are in bounds; `mask_mn` for both axes
`out_mask_m`        a mask for one operand only
`x_MK`              a block of values in registers, by its axes; `score_M` has one axis
`acc_MN`            a sum, kept in the dtype `ACC`
`BLOCK_M`           length of a block along an axis, a power of 2
`EVEN_M`            whether `BLOCK_M` divides the size, so that no mask is needed
`HAS_`, `NEEDS_`    whether an operand is present, whether a result is required
==================  ================================================================================

Lower-case suffixes are axes of indices, capitals the shape of values in registers; scalars and
values of any shape have no suffix. Arguments in capitals are compile-time constants: a kernel is
compiled for each of their values.
"""
