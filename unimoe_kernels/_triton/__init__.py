"""What the Triton kernels of several operators share; needs triton, so it is imported lazily.

Names mean the same in all kernels.

Axes are letters. A tile has `M` rows and `N` columns, and a matmul sums along `K`; `E` are experts
(or the buckets they are sorted into), `R` the columns of a low rank, `C` the parts of a sum that
several programs share. The router has `T` tokens, `E` experts, `G` groups and `K` choices.

==================  ================================================================================
name                what it is
==================  ================================================================================
`x_ptr`             address of the first element of a tensor, an argument
`x_source`          the same, or a tensor descriptor: `X_FORM` says which; see `descriptors.py`
`x_ptrs`            addresses of a block
`x_place`           addresses of a block, or where in a descriptor it starts
`stride_x_m`        stride of a tensor along an axis
`num_rows`          number of something; `width`, `height` and `inner` are sizes along `N`, `M`, `K`
`pid_m`, `tile_m`   number of a program, of a tile, along an axis; `tile` of all axes together
`offs_m`            indices along an axis, of as many elements as the block has
`start_m`           the first of them, where a loop moves along
`mask_m`            which of these indices exist; `mask_mn` for both axes
`out_mask_m`        a mask that is meant for one operand only
`x_MK`              a block of numbers in registers, by its axes; `score_M` has one
`acc_MN`            a sum, kept in the dtype `ACC`
`BLOCK_M`           length of a block along an axis, a power of 2
`EVEN_M`            whether `BLOCK_M` divides the size, so that no mask is needed
`HAS_`, `NEEDS_`    whether an operand is present, whether a result is required
==================  ================================================================================

Lower-case letters index an axis, capitals say what shape numbers have; single numbers and those of
any shape have no suffix. Arguments in capitals are constants: each value is compiled for itself.
"""
