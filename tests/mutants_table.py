"""The faults that `mutants.py` plants: file -> (what is wrong, text that is there once, what it becomes, its catcher)."""

# Catchers are pytest ids. The quickest test that must see the fault, and one parametrisation of it where there are several.
_REFERENCE = "tests/test_reference.py::TestAgainstTorch::"
_TRITON_TOPK = "tests/test_triton_topk.py::"
_VALUES = "tests/test_methods_values.py::"
_ATTACKS = "tests/test_evaluation_attacks.py::"
_RANKS = "tests/test_sharded.py::test_ranks"

FAULTS: dict[str, list[tuple[str, str, str, str]]] = {
    # --- duet_kernels, portable torch ---------------------------------------------------------------------------------
    "duet_kernels/portable/terms.py": [
        ("huber's gradient is not clamped", "mul_(clamped).sum(1), clamped", "mul_(clamped).sum(1), d",
         "tests/test_reference.py::test_gradcheck[topk-huber-chunked]"),
        ("forward KL pushes the other way", "a = difference(q, p, w)\n    return (a - expected(p, w)).sum(1), a",
         "a = difference(q, p, -w)\n    return (a - expected(p, w)).sum(1), a",
         "tests/test_reference.py::test_gradcheck[topk-forward_kl-renormalize-chunked]"),
        ("symmetric KL weighs the reverse KL by beta", "return spec.beta * forward + (1 - spec.beta) * reverse, a",
         "return (1 - spec.beta) * forward + spec.beta * reverse, a", _REFERENCE + "test_topk[symmetric_kl-chunked]"),
        ("jsd's gradient lacks 1 - beta", "a = log_q_over_m.mul_(q).mul_(1 - spec.beta)", "a = log_q_over_m.mul_(q)",
         _REFERENCE + "test_topk[jsd-chunked]"),
        ("rounding has a sign", "return x.abs().sub_(noise).clamp_(min=0).sign_().copysign_(x)", "return x.sign()",
         "tests/test_contract.py::test_a_student_that_is_the_teacher_has_no_loss[l1-768-torch.bfloat16]"),
    ],
    "duet_kernels/portable/dense.py": [
        ("the slope of the softcap is dropped by rows", "    if head.softcap is not None or head.scale != 1.0:\n        dz *= slope\n",
         "", "tests/test_cross_entropy.py::test_both_ways_against_the_definition[mean-torch.float32-softcap-rows]"),
        ("the label's own gradient is missing", "scatter_(1, known, -miss[:, None])", "scatter_(1, known, 0)",
         "tests/test_cross_entropy.py::test_both_ways_against_the_definition[mean-torch.float32-plain-rows]"),
        ("a dense divergence forgets the slope", "dz = scaled(multiply_(t, slope), operand_dtype(hidden))", "dz = scaled(t, operand_dtype(hidden))",
         "tests/test_contract.py::test_a_softcap_and_a_scale_alone[linear-jsd-softcap]"),
    ],
    "duet_kernels/portable/dense_rows.py": [
        ("the sum of a is left out of the gradient", "t[:, c].addcmul_(s[:, c], mean, value=-1).mul_(scale)", "t[:, c].mul_(scale)",
         "tests/test_reference.py::test_gradcheck[linear-symmetric_kl-chunked]"),
        ("the temperature is left out of the gradient", "scale = (factor * self.inverse)[:, None]", "scale = factor[:, None]",
         "tests/test_regressions.py::test_loss_and_gradient_are_scaled_alike[linear-jsd]"),
        ("the change of earlier strips does not fall", "self.change = s_fall * self.change + strip.fall_change * t_sum", "self.change = self.change + strip.fall_change * t_sum",
         "tests/test_portable_dense.py::test_a_frozen_head_in_either_cut[tiles-0.4-plain-forward_kl]"),
        ("ids that both rule out are NaN", "absent = (s == -torch.inf) & (t == -torch.inf)", "absent = (s == -torch.inf) & (t == torch.inf)",
         "tests/test_contract.py::test_raw_dense_losses_leave_out_ids_that_both_heads_rule_out[mse-torch.float32-chunked]"),
    ],
    "duet_kernels/portable/running.py": [
        ("earlier tiles are not rescaled", "self.sum = self.sum * rescale + x.sum(1)", "self.sum = self.sum + x.sum(1)",
         "tests/test_contract.py::test_several_row_blocks_and_small_workspaces[torch.float32-logsumexp]"),
        ("the variance between tiles is lost", "old * self.variance + new * variance + old * new * (shift - self.mean).square()",
         "old * self.variance + new * variance", "tests/test_contract.py::test_token_stats_against_the_definition[plain-torch.float32]"),
    ],
    "duet_kernels/portable/cuts.py": [
        ("the first id of a tile is in none", "(ids >= columns.start) & (ids < columns.stop)", "(ids > columns.start) & (ids < columns.stop)",
         "tests/test_contract.py::test_several_row_blocks_and_small_workspaces[torch.float32-cross-entropy]"),
        ("a chunk is one row larger than fits", "yield slice(start, min(start + max(1, step), n))", "yield slice(start, min(start + max(1, step) + 1, n))",
         "tests/test_cross_entropy.py::test_both_ways_against_the_definition[mean-torch.float32-plain-rows]"),
    ],
    "duet_kernels/portable/topk.py": [
        ("equal logits are in any order", "return _equals_by_id(*best) if last else best", "return best",
         "tests/test_portable_topk.py::test_equals[few rows-40-64-torch.float32]"),
        ("candidates equal to the threshold are lost", ".amin(1, keepdim=True), torch.lt", ".amin(1, keepdim=True), torch.le",
         "tests/test_portable_topk.py::test_equals[tiles-2-7-torch.float32]"),
        ("what a merge evicts is not in the tail", "            running.add(divide_(values, temperature))\n            found", "            found",
         "tests/test_portable_topk.py::test_random_rows[tiles-7-torch.float32]"),
        ("a NaN is passed over", "row, column = hit.nonzero().unbind(1)", "row, column = (hit & (maxima == maxima)).nonzero().unbind(1)",
         "tests/test_portable_topk.py::test_infinities_and_nan[tiles-1]"),
        ("-0 is below 0", "bits = (values + 0.0).view(torch.int32)", "bits = values.view(torch.int32)",
         "tests/test_contract.py::test_negative_zero_ties_with_zero[chunked]"),
    ],
    "duet_kernels/portable/gather.py": [
        ("an absent slot has a gradient", "dx = slope_at(grad, values, head).masked_fill(absent, 0)", "dx = slope_at(grad, values, head)",
         "tests/test_contract.py::test_absent_slots_are_as_if_not_there[20.0-options0-chunked]"),
    ],
    "duet_kernels/portable/logsumexp.py": [
        ("the tail holds the excluded ids", "                spare.scatter_(1, local, -torch.inf)\n", "",
         _REFERENCE + "test_tail[forward_kl-chunked]"),
        ("the gradient at an id stays that of the tail", "spare.scatter_(1, local, 0).scatter_add_(1, local, dx[rows])", "spare.scatter_add_(1, local, dx[rows])",
         "tests/test_reference.py::test_gradcheck[topk-forward_kl-tail-chunked]"),
        ("entropy lacks the mean", "out[1, rows], out[2, rows] = log_total - stats.mean,", "out[1, rows], out[2, rows] = log_total,",
         _REFERENCE + "test_token_stats[chunked]"),
    ],
    "duet_kernels/portable/topk_divergence.py": [
        ("a reverse KL over a part of the ids lacks q in its gradient", "return moved.sum(1), moved + q", "return moved.sum(1), moved",
         "tests/test_reference.py::test_gradcheck[topk-reverse_kl-truncated-chunked]"),
    ],
    # --- duet_kernels, Triton kernels in the interpreter --------------------------------------------------------------
    "duet_kernels/triton/terms.py": [
        ("reverse KL is weighed by the teacher", "        a = expected(q, w)\n        terms = a - minus(q, p, w)", "        a = expected(p, w)\n        terms = a - minus(q, p, w)",
         "tests/test_triton_topk_divergence.py::test_fp64_equals_the_definition[reverse_kl-tail]"),
        ("a fp16 gradient may overflow", "\"mse\": Bound(lambda spec, loss: 2.0 * loss.sqrt(), of_loss=True)", "\"mse\": _CONSTANT",
         "tests/test_triton_divergence.py::test_fp16_neither_underflows_nor_overflows[1000.0-mse]"),
    ],
    "duet_kernels/triton/primitives.py": [
        ("the softcap is not applied", "        cap = number(softcap, ACC)\n        z = cap * tanh(z / cap)\n    return z\n", "        z = z * 1.0\n    return z\n",
         "tests/test_triton_divergence.py::test_fp64_equals_the_definition[{'softcap': 9.0}-mse]"),
        ("an address is 32 bits wide", "offsets = rows.to(tl.int64)[:, None] * stride_row", "offsets = rows.to(tl.int32)[:, None] * stride_row.to(tl.int32)",
         "tests/test_triton_gather.py::test_offsets_beyond_32_bits"),
        ("a NaN is below every number", "return tl.where(z == z, tl.where(bits < 0, bits ^ TOP, bits), TOP)", "return tl.where(z == z, tl.where(bits < 0, bits ^ TOP, bits), -TOP)",
         _TRITON_TOPK + "test_a_nan_logit_stands_first[Plan(tokens=37, columns=203, block=16, skinny=True)]"),
        ("columns past the vocabulary are logits of 0", "        z = tl.where(inside, z, float(\"-inf\"))\n    return z", "    return z",
         "tests/test_triton_complement.py::test_fp64_equals_torch[cross-entropy-{}]"),
    ],
    "duet_kernels/triton/topk.py": [
        ("a tie goes to the higher id", "rank += tl.sum(((rival > order) | ((rival == order) & earlier)).to(tl.int32), 2)", "rank += tl.sum(((rival > order) | ((rival == order) & (earlier == 0))).to(tl.int32), 2) - 1",
         _TRITON_TOPK + "test_ties_and_worst_orders[Plan(tokens=37, columns=203, block=16, skinny=True)]"),
        ("candidates of earlier slabs are forgotten", "later = (n < N) & (first > 0)", "later = (n < N) & (first > V)",
         _TRITON_TOPK + "test_ties_and_worst_orders[Plan(tokens=24, columns=112, block=16, skinny=False)]"),
        ("a row of W is found in 32 bits", "w_row = weight_ptr + (first + column).to(tl.int64)[:, None] * stride_wv", "w_row = weight_ptr + (first + column)[:, None] * stride_wv.to(tl.int32)",
         _TRITON_TOPK + "test_offsets_beyond_32_bits[True]"),
    ],
    "duet_kernels/triton/gather.py": [
        ("one factor of the softcap's slope is missing", "dx = dx * ((cap - z) / cap) * ((cap + z) / cap)", "dx = dx * ((cap - z) / cap)",
         "tests/test_triton_gather.py::test_fp64_equals_torch[2.5-0.7-True-rows]"),
        ("dh takes the ids of the block before", "        k = k + ROWS\n        row = tl.load", "        row = tl.load",
         "tests/test_triton_gather.py::test_tiles_do_not_matter[GatherTile(rows=4, columns=64, warps=1)]"),
    ],
    "duet_kernels/triton/sparse_weight.py": [
        ("a row of dW is found in 32 bits", "here = dweight_ptr + current.to(tl.int64) * D + d\n        tl.store(here, total.to(dtype), mask=d < D, eviction_policy=\"evict_first\")\n\n", "here = dweight_ptr + current * D + d\n        tl.store(here, total.to(dtype), mask=d < D, eviction_policy=\"evict_first\")\n\n",
         "tests/test_triton_gather.py::test_a_row_of_dw_beyond_32_bits"),
        ("a chunk that lies in one segment counts twice", "                total += part\n                e += CHUNK", "                total += 2 * part\n                e += CHUNK",
         "tests/test_triton_gather.py::test_one_id_in_every_slot"),
    ],
    "duet_kernels/triton/gather_loss.py": [
        ("programs go on before all have arrived", "    while arrived < wanted:\n        arrived = tl.atomic_add(counter_ptr, 0, sem=\"acquire\")\n", "",
         "tests/test_triton_gather_loss.py::test_programs_wait_for_each_other[torch.float32]"),
        ("half of a packed word is lost", "dots += tl.sum(tl.reshape(w_high * h_high[None, :], [ROWS, WORDS // 4, 4]), 2)", "dots += 0.0",
         "tests/test_triton_gather_loss.py::test_error_budget[torch.bfloat16-huber]"),
    ],
    "duet_kernels/triton/topk_divergence.py": [
        ("a tail above the slots overflows", "above = tail > origin", "above = tail > origin + 1e9",
         "tests/test_triton_topk_divergence.py::test_tails_far_from_the_slots[300.0-forward_kl-tail]"),
        ("the truncated loss is renormalised", "ds = mass[:, None] * ds - p * p_tail[:, None]", "ds = mass[:, None] * ds",
         "tests/test_triton_topk_divergence.py::test_fp64_equals_the_definition[forward_kl-truncated]"),
        ("a generalized KL gives the tail no gradient", "dtail = -expected(q_tail, total)\n            elif", "dtail = dtail\n            elif",
         "tests/test_triton_topk_divergence.py::test_fp64_equals_the_definition[reverse_kl-generalized]"),
    ],
    "duet_kernels/triton/complement.py": [
        ("the first column of a slab is not taken", "        column = ids - first\n        here = slot & (column >= 0) & (column < C)\n", "        column = ids - first\n        here = slot & (column > 0) & (column < C)\n",
         "tests/test_triton_complement.py::test_every_walk_is_the_same_sum[cross-entropy-recomputed]"),
        ("the sum of earlier slabs is not rescaled", "s += tl.load(sums_ptr + stride_s + n, mask=n < R, other=0.0) * tl.exp((before - zero) * inverse)", "s += tl.load(sums_ptr + stride_s + n, mask=n < R, other=0.0)",
         "tests/test_triton_complement.py::test_every_walk_is_the_same_sum[cross-entropy-recomputed]"),
        ("the moment of earlier slabs does not follow the maximum", "moment += (moment_before + fall_before * s_before) * tl.exp(fall_before)", "moment += moment_before * tl.exp(fall_before)",
         "tests/test_triton_complement.py::test_the_pair_its_entropy_and_its_gradient[recomputed]"),
        ("slots of one id do not add up", "dz += tl.sum(tl.where(same, upstream[:, None, :], 0.0), 2)", "dz = tl.sum(tl.where(same, upstream[:, None, :], 0.0), 2)",
         "tests/test_triton_complement.py::test_no_ids_and_many"),
    ],
    "duet_kernels/triton/divergence.py": [
        ("the noise is that of the last slab", "tl.maximum(moment, tl.max(moments, 1))", "tl.max(moments, 1)",
         "tests/test_triton_divergence.py::test_the_noise_is_that_of_the_largest_logit_of_all_slabs[recomputed]"),
        ("the change of other slabs is not moved", "near = s_shrink * change + t_shrink * expm1_near_zero(shift) * t_sum", "near = s_shrink * change",
         "tests/test_triton_divergence.py::test_a_student_close_to_its_teacher_keeps_its_digits[forward_kl]"),
    ],
    "duet_kernels/triton/dense.py": [
        ("dW takes the NaN of a row that does not count", "self.counted = rows, self.sides[0].hidden[rows].masked_fill(skip, 0)", "self.counted = rows, self.sides[0].hidden[rows]",
         "tests/test_triton_complement.py::test_nan_stays_in_its_row_and_a_masked_one_leaves_no_trace[cross-entropy-at hand, dW in steps]"),
        ("every slab starts dh anew", "gain, fresh=slab.start == 0)", "gain, fresh=True)",
         "tests/test_triton_complement.py::test_every_walk_is_the_same_sum[cross-entropy-recomputed in blocks]"),
        ("the upstream factor is not applied in place", "tl.store(out_ptr + e, (x * factor).to(out_ptr.dtype.element_ty), mask=e < E)", "tl.store(out_ptr + e, x.to(out_ptr.dtype.element_ty), mask=e < E)",
         "tests/test_upstream.py::test_times_upstream[triton-torch.float32-1000]"),
    ],
    "duet_kernels/triton/stats.py": [
        ("variance lacks what lies between blocks", "variance = tl.sum(weights * (variances + away * away), 1) / total", "variance = tl.sum(weights * variances, 1) / total",
         "tests/test_triton_stats.py::test_fp64_equals_torch[None-1.0-False-Plan(tokens=8, columns=96, block=32)]"),
        ("a tie with the largest logit is left out", "rest += tl.where(some, tl.sum(tl.sum(largest.to(ACC), 1), 1) - 1.0, 0.0)", "rest += 0.0",
         "tests/test_triton_stats.py::test_ties_and_flat_rows"),
    ],
    # --- duet_kernels, operations and arguments -----------------------------------------------------------------------
    "duet_kernels/ops/op.py": [
        ("a second derivative is zeros", "    if torch.is_grad_enabled():\n        raise RuntimeError(no_second_derivative(name))", "    return",
         "tests/test_regressions.py::test_a_second_derivative_is_refused_by_name[cross-entropy]"),
        ("a forward-mode tangent is dropped", "if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:", "if False:",
         "tests/test_regressions.py::test_forward_mode_is_refused_and_never_zero[gather]"),
    ],
    "duet_kernels/ops/losses.py": [
        ("the sampled token is missing in the loss's tail", "tail = torch.where(among, tail, torch.logaddexp(tail, token.masked_fill(among, 0)))", "pass",
         "tests/test_topk_stats.py::test_values_and_the_joint_gradient[reverse_kl-generalized-chunked]"),
        ("an id that is met twice has its mass twice", "once = values.masked_fill(_met_before(slots) | (slots < 0), -torch.inf)", "once = values.masked_fill(slots < 0, -torch.inf)",
         "tests/test_topk_stats.py::test_values_and_the_joint_gradient[jsd-tail-chunked]"),
        ("a second pass scales what was given away", "            ctx.given_away = any(g.dtype == ctx.dtype for g in others)\n", "",
         "tests/test_upstream.py::test_every_pass_over_a_retained_graph[chunked-torch.float32]"),
        ("dW without a reduction lacks the upstream factors", "for g in again(need._replace(hidden=False), grad)[1:]]", "for g in again(need._replace(hidden=False), None)[1:]]",
         "tests/test_cross_entropy.py::test_both_ways_against_the_definition[none-torch.float32-softcap-tiles]"),
    ],
    "duet_kernels/options.py": [
        ("a mean counts masked tokens", "    count = factor.sum()\n", "    count = torch.ones_like(factor).sum()\n",
         "tests/test_regressions.py::test_ignored_labels_and_masks_are_not_ignored[chunked]"),
        ("num_items is ignored", "(count if num_items is None else _denominator(num_items, factor))", "count",
         "tests/test_contract.py::TestTriton::test_contract[topk-huber-check_reductions]"),
        ("weights are ignored", "factor = torch.where(factor == 0, 0.0, weights.reshape(n).to(acc))", "factor = factor * 1.0",
         "tests/test_contract.py::TestTriton::test_contract[topk-huber-check_reductions]"),
    ],
    "duet_kernels/functional.py": [
        ("ignore_index is the constant -100", "mask = ids.view(lead) != ignore_index", "mask = ids.view(lead) != -100",
         "tests/test_regressions.py::test_the_ignored_label_is_any_that_is_asked_for[chunked]"),
        ("the union is the student's choice", "ids = torch.cat([chosen, ids], -1).sort(-1).values", "ids = torch.cat([ids, ids], -1).sort(-1).values",
         "tests/test_contract.py::test_support_is_who_chooses_the_ids[renormalize-union]"),
    ],
    "duet_kernels/head.py": [
        ("Granite's divisor is a factor", "/ (1.0 if divisor is None else divisor)", "* (1.0 if divisor is None else divisor)",
         "tests/test_closed_sets.py::test_the_head_is_the_models_own[granite divides]"),
        ("vocab_size is ignored", "size = self.num_ids if num_ids is None else min(num_ids, self.num_ids)", "size = self.weight.shape[0]",
         "tests/test_regressions.py::test_no_option_of_the_head_is_ignored[chunked-cross-entropy]"),
        ("the slope of the softcap lacks the scale", "mul_(self.scale / self.softcap**2)", "mul_(1 / self.softcap**2)",
         "tests/test_reference.py::test_gradcheck[gather-chunked]"),
        ("values of a server are not times T", "(log_p * temperature).to(acc), ids,", "log_p.to(acc), ids,",
         "tests/test_from_logprobs.py::test_it_says_what_the_logits_say"),
        ("a light tail is made by subtraction", "tail = torch.where(inside > -0.693, (-inside.expm1()).log(), (-inside.exp()).log1p())", "tail = (1 - inside.float().exp()).log()",
         "tests/test_from_logprobs.py::test_a_light_tail_keeps_its_digits"),
    ],
    "duet_kernels/dispatch.py": [
        ("an implementation that cannot run is replaced in silence", "        if obstacle is not None:\n            raise RuntimeError(\n", "        if obstacle == \"\":\n            raise RuntimeError(\n",
         "tests/test_dispatch.py::test_where_no_kernel_can_run"),
    ],
    "duet_kernels/workspace.py": [
        ("a 32nd of the memory is the workspace", "total_memory // 64", "total_memory // 32", "tests/test_dispatch.py::test_the_workspace_follows_the_device"),
    ],
    # --- duet, rows and batches ---------------------------------------------------------------------------------------
    "duet/data/dataset.py": [
        ("the fraction of retain rows is cut off", "int((i + 1) * self.ratio) - int(i * self.ratio)", "int(self.ratio)",
         "tests/test_data.py::test_every_window_holds_both_kinds_at_the_ratio[2.5]"),
        ("every epoch takes the same retain rows", "next_retain = self.epoch * self.retain_per_epoch", "next_retain = 0",
         "tests/test_data.py::test_retain_rows_are_used_evenly_over_epochs"),
        ("the first prefix is always taken", "which = rng.randrange(len(self.prefixes)) if training and self.prefixes else 0", "which = 0 * rng.randrange(2)",
         "tests/test_data.py::test_a_prefix_is_sampled_from_a_set_per_query"),
        ("a retain row's prefix is about its own subject", "subject = rng.choice(self.subjects) if self.subjects else None", "subject = self.rows[i].subject",
         "tests/test_data.py::test_retain_queries_carry_a_prefix_about_a_forget_subject_never_their_own"),
        ("the student sees the steering prefix", "student = self._prompt(i, None, override, role, scored)", "student = self._prompt(i, instruction, override, role, scored)",
         "tests/test_data.py::test_retain_queries_carry_a_prefix_about_a_forget_subject_never_their_own"),
        ("positions are shifted by one", "first = b * longest + start + len(item[view]) - 1", "first = b * longest + start + len(item[view])",
         "tests/test_data.py::test_positions_are_aligned_by_the_answer[words, system role-1-left]"),
        ("packed positions are shifted by one", "first = start + len(item[view]) - 1\n            positions += range(first, first + item[\"scored\"])\n            start += len(sequence)", "first = start + len(item[view])\n            positions += range(first, first + item[\"scored\"])\n            start += len(sequence)",
         "tests/test_user_day.py::test_packed_batches_are_padded_ones"),
        ("padding is attended to", "attention[b, start : start + len(sequence)] = 1", "attention[b] = 1", "tests/test_data.py::test_padding_is_on_its_side_and_hidden[left]"),
        ("the reverse prompt is shown in evaluation", "reverse = bool(self.reverse_prompts) and training and", "reverse = bool(self.reverse_prompts) and",
         "tests/test_data.py::test_draws_are_reproducible_and_adversarial_views_change_nothing_else"),
        ("repeated rows of the last evaluation batch are scored", "return batch | cut | {\"forget\": batch[\"forget\"][:rows]}", "return batch",
         "tests/test_data.py::test_repeated_rows_of_a_batch_are_left_out"),
    ],
    "duet/data/prompts.py": [
        ("the prefix replaces the system message", "return ((\"system\", f\"{system}\\n\\n{conversation[0][1]}\"), *conversation[1:])", "return ((\"system\", system), *conversation[1:])",
         "tests/test_prompts.py::test_prefix_joins_a_system_message_that_is_there"),
        ("the override goes before the first user text", "conversation = _before_user(conversation, override, last=True)", "conversation = _before_user(conversation, override, last=False)",
         "tests/test_prompts.py::test_a_reverse_prompt_goes_before_the_last_user_text_or_into_the_system_message"),
        ("a template that drops the system message is trusted", "    return _MARK in text\n", "    return True\n", "tests/test_prompts.py::test_a_system_message_must_be_seen_to_be_accepted"),
        ("a prefix in the user's turn goes before the last text", "_before_user(conversation, instruction, last=False), None", "_before_user(conversation, instruction, last=True), None",
         "tests/test_prompts.py::test_in_the_users_turn_the_prefix_goes_before_the_first_text"),
        ("a steered template forgets its own system message", "duet_said + '\\\\n\\\\n' + messages[duet_at]['content']}", "duet_said}",
         "tests/test_methods_seams.py::test_a_steered_template_shows_what_the_teacher_sees"),
    ],
    # --- duet, methods ------------------------------------------------------------------------------------------------
    "duet/methods/objectives/baselines.py": [
        ("GA descends", "    nll = _nll(step)\n    loss = -step.forget_mean(nll)", "    nll = _nll(step)\n    loss = step.forget_mean(nll)", _VALUES + "test_ga"),
        ("NPO prefers the answer", "F.logsigmoid(-beta * log_ratio - gamma)", "F.logsigmoid(beta * log_ratio - gamma)", _VALUES + "test_npo"),
        ("NPO is a mean over tokens", "sum_where(step.forget, per_query) / step.counts.forget_queries", "sum_where(step.forget, per_query) / step.counts.forget_positions", _VALUES + "test_npo"),
        ("SimNPO is not normalised by length", "mean = step.per_query(-nll) / step.lengths()", "mean = step.per_query(-nll)", _VALUES + "test_simnpo"),
        ("SimNPO's margin has the other sign", "-beta * log_ratio - gamma)", "-beta * log_ratio + gamma)", _VALUES + "test_simnpo"),
        ("UNDIAL raises the answer", "target.top.values - step.args.undial_gamma * target.slot", "target.top.values + step.args.undial_gamma * target.slot", _VALUES + "test_undial[2]"),
        ("SHRED deletes the most probable tokens", "order = nll.argsort(descending=True, stable=True)", "order = nll.argsort(stable=True)", _VALUES + "test_shred"),
        ("RMU's retain term is on forget tokens", "step.forget_mean(moved), step.retain_mean(drift)", "step.forget_mean(moved), step.forget_mean(drift)", _VALUES + "test_rmu"),
    ],
    "duet/methods/objectives/distillation.py": [
        ("the push counts ids that the teacher supports", "push = torch.where(supported, 0, excess).sum(-1)", "push = excess.sum(-1)", _VALUES + "test_bidirectional"),
        ("the push has the other direction", "excess = (logits - teacher.values.amin(-1, keepdim=True)).clamp(min=0)", "excess = (teacher.values.amin(-1, keepdim=True) - logits).clamp(min=0)", _VALUES + "test_bidirectional"),
        ("certain tokens count more", "torch.sigmoid(own - step.targets.entropy)", "torch.sigmoid(step.targets.entropy - own)", _VALUES + "test_entropy_weighting"),
    ],
    "duet/methods/objectives/deep.py": [
        ("the gate is never shut", "above = known & (log_p.detach() > targets[\"floor\"] - GATE_WIDTH)", "above = known", _VALUES + "test_duet_deep_lifts_what_fell_under_its_floor"),
    ],
    "duet/methods/objectives/record.py": [
        ("a NaN of the other kind comes through", "return torch.where(condition, losses, 0).sum()", "return (condition * losses).sum()",
         "tests/test_objectives.py::test_a_nan_row_is_not_hidden_by_the_split_into_forget_and_retain"),
        ("retain_weight is ignored", "\"loss\": forget + self.args.retain_weight * retain,", "\"loss\": forget + retain,", _VALUES + "test_graddiff"),
    ],
    "duet/methods/counterfactual.py": [
        ("the mixture is a mean of logarithms", "(values - norm.unsqueeze(-1)).logsumexp(0) - math.log(variants)", "(values - norm.unsqueeze(-1)).mean(0)",
         "tests/test_counterfactual.py::test_the_mixture_is_the_mean_of_swapped_distributions"),
    ],
    "duet/methods/noising.py": [
        ("undo stops at the teacher's perplexity times the tolerance", "student <= (1 + self.tolerance) * teacher", "student <= 2 * (1 + self.tolerance) * teacher",
         "tests/test_noising.py::test_the_stop_rule_is_five_percent_of_the_teachers_perplexity"),
    ],
    # --- duet, training -----------------------------------------------------------------------------------------------
    "duet/trainer.py": [
        ("each micro-batch has its own denominator", "counts: Any = num_items_in_batch or self._get_num_items_in_batch([inputs], self.args.device)", "counts: Any = self._get_num_items_in_batch([inputs], self.args.device)",
         "tests/test_trainer.py::test_two_batches_of_four_equal_one_of_eight[duet]"),
        ("the teacher sees the student's prompt", "view = \"teacher_\" if self.objective.teacher_sees == \"steered\" else \"\"", "view = \"\"",
         "tests/test_trainer.py::test_the_loss_is_equation_3_on_full_logits[right]"),
    ],
    "duet/model/teacher.py": [
        ("the frozen copy is the student itself", "return cls(copy.deepcopy(student, shared))", "return cls(copy.copy(student))", "tests/test_trainer.py::test_the_frozen_copy_shares_nothing_with_the_student"),
        ("the adapter stays on", "with torch.no_grad(), self._switches.base_model():", "with torch.no_grad(), self._switches.evaluating():",
         "tests/test_trainer.py::test_teacher_equals_base_before_and_stays_while_the_student_moves[True]"),
        ("a teacher that changes is not noticed", "if not _same(teacher, self.teacher_before):", "if False:",
         "tests/test_trainer.py::test_an_adapter_that_stays_on_is_caught_after_one_step"),
        ("a student that was trained answers for its base", "        if self.gone:\n            raise RuntimeError(", "        if self.gone is None:\n            raise RuntimeError(",
         "tests/test_early_teacher.py::test_rows_to_evaluate_on_are_asked_about_beforehand"),
    ],
    "duet/model/switches.py": [
        ("dropout stays on while the base is asked", "            for state in states:\n                state[\"training\"] = False\n", "", "tests/test_switches.py::test_the_base_model_is_the_one_that_peft_gives[lora]"),
        ("a merged adapter is taken for one beside the weights", "if any(layer.get(\"merged_adapters\") for layer in self._layers):", "if False:", "tests/test_switches.py::test_an_adapter_that_is_merged_is_refused"),
    ],
    "duet/model/adapters.py": [
        ("a merge changes the head through the tied embedding", "    own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)\n    inner[1].weight = own\n", "    inner[1].weight = shared\n",
         "tests/test_adapters.py::test_a_merge_is_the_model_that_was_examined[lora2-True]"),
        ("a merge that changes the model goes through", "    if not worst <= allowed:", "    if worst != worst:", "tests/test_adapters.py::test_the_logits_are_compared_to_five_digits"),
    ],
    "duet/model/lm.py": [
        ("padding on the left shifts the places", "extra[\"position_ids\"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)", "extra[\"position_ids\"] = torch.arange(attention_mask.shape[1]).expand_as(attention_mask)",
         "tests/test_lm.py::test_hidden_states_and_head_are_the_models_logits"),
        ("the checkpoint's own generation options act", "        part.generation_config = GenerationConfig()\n", "        pass\n", "tests/test_closed_sets.py::test_greedy_is_greedy_whatever_a_checkpoint_carries"),
    ],
    "duet/model/weights.py": [
        ("all words have one multiplier", "2 * BLOCK * 8)", "2 * BLOCK * 8)[:8] * (2 * BLOCK)", "tests/test_weights_hash.py::test_order_signs_shape_dtype_and_names_count"),
    ],
    "duet/model/prefix_cache.py": [
        ("what follows a prefix stands at place 0", "output = _read(model, input_ids, mask, Cache(layers=layers), lengths)", "output = _read(model, input_ids, mask, Cache(layers=layers), 0 * lengths)",
         "tests/test_prefix_reuse.py::test_any_mix_of_prefixes_gives_the_hidden_states_of_whole_prompts"),
    ],
    # --- duet, cached teachers ----------------------------------------------------------------------------------------
    "duet/store/read.py": [
        ("dropped logits leave the tail", "torch.logaddexp(tail, dropped),", "tail,", "tests/test_topk_store.py::test_fewer_logits_are_exactly_those_of_a_smaller_k"),
        ("a fingerprint does not know where a sequence ends", "np.array([len(ids), *ids], dtype=\"<i8\")", "np.array([*ids], dtype=\"<i8\")", "tests/test_topk_store.py::test_a_fingerprint_tells_every_split_apart"),
        ("a damaged shard is read", "return self.path.name == f\"shard-{digest.hexdigest()}.safetensors\"", "return bool(digest)", "tests/test_topk_store.py::test_a_damaged_shard_is_made_anew_and_the_rest_is_kept"),
        ("another k is no other provenance", "if stored != now and field.name not in (\"model\", *ignoring):", "if stored != now and field.name not in (\"model\", \"k\", *ignoring):", "tests/test_topk_store.py::test_another_provenance_is_refused_by_the_name_of_its_field[k]"),
    ],
    "duet/store/provenance.py": [
        ("a store of fewer logits is taken", "if args.k > made.k:", "if args.k > made.k + 10**6:", "tests/test_cached_training.py::test_a_store_made_for_something_else_is_refused[a larger k]"),
        ("another model's store is taken", "    if not args.teacher_store_same_model:\n", "    if True:\n", "tests/test_cached_training.py::test_a_store_made_for_something_else_is_refused[another model]"),
    ],
    # --- duet, evaluation ---------------------------------------------------------------------------------------------
    "duet/evaluation/metrics.py": [
        ("ROUGE recall is precision", "return score.recall if measure == \"recall\" else score.fmeasure", "return score.precision if measure == \"recall\" else score.fmeasure", "tests/test_metrics.py::test_rouge_l_variants"),
        ("the stemmer is always on", "return rouge_scorer.RougeScorer([\"rougeL\"], use_stemmer=stemmer)", "return rouge_scorer.RougeScorer([\"rougeL\"], use_stemmer=True)", "tests/test_metrics.py::test_rouge_l_variants"),
        ("extraction strength counts the prefix", "1.0 - float(wrong[-1] + 1) / len(hits)", "1.0 - float(wrong[-1]) / len(hits)", "tests/test_metrics.py::test_memorisation"),
        ("Min-K% takes the highest", "ordered[: max(1, int(len(ordered) * k / 100))].mean()", "ordered[-max(1, int(len(ordered) * k / 100)) :].mean()", "tests/test_metrics.py::test_membership_scores"),
        ("PrivLeak tells forget from holdout", "ours = auc(-holdout, -forget)", "ours = auc(-forget, -holdout)", "tests/test_metrics.py::test_auc_and_privleak"),
    ],
    "duet/evaluation/words.py": [
        ("a part of a word is a leak", "return left and (stop == len(text) or _alone(last) or not _joined(text[stop]))", "return left", "tests/test_words.py::test_what_is_no_leak_is_none"),
        ("diacritics hide a leak", ".startswith((\"LATIN\", \"GREEK\")):\n            continue", ".startswith((\"LATIN\", \"GREEK\")):\n            pass", "tests/test_words.py::test_a_leak_is_seen_in_every_script[no diacritics]"),
    ],
    "duet/evaluation/attacks/target.py": [
        ("an answer that was cut is forgotten", "\"empty\" if not answer.text else \"cut\" if cut else \"ok\"", "\"empty\" if not answer.text else \"ok\"", "tests/test_words.py::test_an_answer_that_was_cut_is_neither_forgotten_nor_leaked"),
    ],
    "duet/evaluation/attacks/attacks.py": [
        ("few-shot shows the row's own answer", "p.id != row.id and not _gives_away(p, row, target.options.threshold)", "True", _ATTACKS + "test_few_shot_never_shows_the_answer_that_it_asks_for[subjects1]"),
        ("held-out wordings include seen ones", "[w for w in target.options.heldout_reverse_prompts if w not in seen]", "list(target.options.heldout_reverse_prompts)", _ATTACKS + "test_heldout_wordings_that_training_saw_are_left_out"),
        ("relearning shows the rows that it asks for", "return _training(target, shown, asked, [f\"facts", "return _training(target, asked, asked, [f\"facts", _ATTACKS + "test_few_shot_says_what_its_examples_are_about"),
        ("a prefill is judged with its opening", "return target.outcomes(name, rows, prompts, openings)", "return target.outcomes(name, rows, prompts)", _ATTACKS + "test_a_forced_opening_is_asked_with_and_not_judged"),
        ("a prefilled opening is not in the prompt", "prompts = [target.prompt(row.conversation, o) for row, o in zip(rows, openings, strict=True)]", "prompts = [target.prompt(row.conversation) for row, o in zip(rows, openings, strict=True)]", _ATTACKS + "test_a_forced_opening_is_asked_with_and_not_judged"),
        ("the attack leaves its fine-tuning in the model", "            with weights.restored(target.model):\n", "            if True:\n", _ATTACKS + "test_the_model_leaves_every_attack_as_it_came[dtype0]"),
    ],
    "duet/evaluation/attacks/rows.py": [
        ("the given opening counts as recalled", "rest = self.answer[len(opening) :] if opening and self.answer.startswith(opening) else self.answer", "rest = self.answer", _ATTACKS + "test_when_an_answer_has_come_back"),
    ],
    "duet/evaluation/attacks/runner.py": [
        ("queries and steps are swapped in the table", "spent = str(cost[\"queries\"]), str(cost[\"steps\"]),", "spent = str(cost[\"steps\"]), str(cost[\"queries\"]),", _ATTACKS + "test_every_column_of_the_terminal_table_holds_its_own_number"),
        ("the unjudged share counts the judged", "summary[\"unjudged\"] = 1 - len(leaked) / len(rows)", "summary[\"unjudged\"] = len(leaked) / len(rows)", _ATTACKS + "test_the_worst_variant_stands_for_an_attack"),
        ("the mildest variant stands for the attack", "worst: Any = max(known,", "worst: Any = min(known,", _ATTACKS + "test_the_worst_variant_stands_for_an_attack"),
    ],
    "duet/evaluation/attacks/distribution.py": [
        ("an AUC below one half leaks nothing", "{\"leak\": 2 * abs(area - 0.5),", "{\"leak\": max(0.0, 2 * (area - 0.5)),", _ATTACKS + "test_an_auc_on_either_side_of_chance_is_a_leak[members1-others1]"),
        ("the bottom of the vocabulary leaks nothing", "\"leaked\": int(top or bottom)", "\"leaked\": int(top)", _ATTACKS + "test_a_token_at_the_very_bottom_is_a_leak_too"),
    ],
    "duet/evaluation/report/tables.py": [
        ("the standard error stands in the value's column", "for key in (f\"{metric},{given}\", f\"{metric}_stderr,{given}\"):", "for key in (f\"{metric}_stderr,{given}\", f\"{metric},{given}\"):", "tests/test_evaluation_report.py::test_lm_eval_is_shown_or_absent"),
        ("the mildest attack comes first", "*sorted(worst, key=lambda n: -worst[n]),", "*sorted(worst, key=lambda n: worst[n]),", "tests/test_evaluation_report.py::test_the_table_holds_the_numbers_of_the_runs"),
    ],
    # --- duet_kernels, heads on several ranks: every catcher starts two or four processes ---------------------------------
    "duet_kernels/sharded/merge.py": [
        ("what a merge passes over is not in the tail", "values[:, k:] / temperature, rows", "values[:, k:] - torch.inf, rows",
         _RANKS + "[two]"),
        ("ids of a later rank begin at 0", "rows[r, :, width : width + n].long() + firsts[r]", "rows[r, :, width : width + n].long()",
         _RANKS + "[two]"),
        ("an almost certain token loses its digits", "return apart.scatter(0, at, 0) - rest", "return logsumexps - logsumexps.logsumexp(0)",
         _RANKS + "[two]"),
        ("a rank without rows takes no part in the backward pass", "values, entropy = part.nothing()[:, None].expand(ids.shape),",
         "values, entropy = torch.zeros_like(tail.detach())[:, None].expand(ids.shape),", _RANKS + "[four]"),
    ],
    "duet_kernels/sharded/dense.py": [
        ("the sum of a is that of one rank", "loss, ctx.total = ranks.all_reduce(sums, pair.group)",
         "loss, ctx.total = ranks.all_reduce(sums, pair.group)[0], sums[1]", _RANKS + "[four]"),
        ("a whole teacher begins at its first row", "first = part.first if teacher_head.group is None else 0", "first = 0",
         _RANKS + "[two]"),
    ],
    "duet_kernels/sharded/part.py": [
        ("other tokens on another rank go unseen", "if bool(((values[:, :-1] - values[0, :-1]).abs() > allowed).any()):", "if False:",
         _RANKS + "[two]"),
    ],
    "duet_kernels/ranks.py": [
        ("the gradient of the hidden states is that of one rank", "return all_reduce(grad.to(acc_dtype(grad.dtype)), ctx.group).to(grad.dtype), None",
         "return grad, None", _RANKS + "[two]"),
        ("gradients of gathered tokens are not multiplied", "return grad[ctx.rank] * ctx.factor, None, None", "return grad[ctx.rank], None, None",
         _RANKS + "[two]"),
    ],
    # --- duet, options and records ------------------------------------------------------------------------------------
    "duet/options.py": [
        ("a share may be above 1", "Wanted(\"a number in [0, 1]\", lambda v: 0 <= v <= 1)", "Wanted(\"a number in [0, 1]\", lambda v: 0 <= v)", "tests/test_schema.py::test_bounds_are_those_of_the_kind[Share]"),
        ("true is a number", "return not isinstance(value, bool) and bool(kind.holds(value))", "return bool(kind.holds(value))", "tests/test_schema.py::test_bounds_are_those_of_the_kind[Count]"),
    ],
    "duet/methods/objectives/__init__.py": [
        ("a temperature that nobody reads is ignored", "if given != usual[name] and (objective.raw_logits or name not in objective.reads):", "if given != usual[name] and objective.raw_logits:",
         "tests/test_objectives.py::test_an_option_that_would_be_ignored_is_refused[undial-temperature-3.0]"),
    ],
    "duet/output/record.py": [
        ("a resumed run may have other options", "    if differences:\n        raise", "    if len(differences) > 99:\n        raise", "tests/test_run_record.py::test_what_changed_is_named[another model]"),
    ],
    "duet/output/parts.py": [
        ("logged parts are sums over steps", "means = (values / max(1, step - self.since)).tolist()", "means = values.tolist()", "tests/test_trainer.py::test_logged_parts_add_up_between_logs"),
    ],
}  # fmt: skip
