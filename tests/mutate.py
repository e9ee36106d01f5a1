#!/usr/bin/env python3
"""Mutations: changes lorasync.h in one place at a time and looks whether the tests notice.

    tests/mutate.py [-j JOBS] [--list] [ROOM | NUMBER | FUNCTION]...      from the repository root

A mutant is a room, a function, a text that stands once in that function, and what stands there instead. White space
does not count, so that formatting changes nothing; a text that is not there (any more) is reported and left out. Each
mutant is built against the programs that are about its room, one after the other until one fails. A program that waits
for deadlines may fail because the machine is busy: it counts if one of its tests fails three times with the mutant, and
never without it in between.

The end is a table of the rooms and a list of the mutants that nothing noticed. Exit status 1 when less than 95 % of all
were noticed. Takes half an hour on two cores; not part of any other target.
"""

import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

# The programs that are about a room, the quickest first.
PROGRAMS = {
    "support": "test_support test_config test_plan_errors",
    "json": "test_config test_image",
    "dtype": "test_dtype",
    "names": "test_names test_declare",
    "layout": "test_layout",
    "gpu": "test_shm_cuda test_nccl test_plans_cuda test_cuda_fake",
    "comm": "test_comm test_session test_nccl",
    "talk": "test_plan_errors test_session test_base",
    "image": "test_image test_delta",
    "plan": "test_plan test_plan_errors test_session",
    "move": "test_plan test_plan_errors test_session test_plans_cuda test_cuda_fake",
    "config": "test_config test_declare",
    "publish": "test_publish test_directory test_tenants test_session test_lend",
    "shm": "test_shm test_tenants test_in_place test_shm_cuda test_in_place_cuda",
    "engine": "test_directory test_tenants test_shm test_doors test_shm_cuda",
    "policy": "test_policy",
    "session": "test_session test_tenants test_declare test_in_place test_in_place_cuda",
    "base": "test_base test_base_cuda",
    "device": "test_plans_cuda test_cuda_fake",
}

# Programs with deadlines or races, in which a single failure may be the machine's.
TIMED = set("""test_comm test_nccl test_session test_plan_errors test_plans_cuda test_cuda_fake test_shm test_directory
test_in_place test_in_place_cuda test_base test_doors""".split())

# room, function, old text, new text
MUTANTS = [
    # -- support
    ("support", "lorasynci_buffer_reserve", "need <= b->capacity", "need <= b->capacity + 1"),
    ("support", "lorasynci_put_format",
     "if (n < 0 || (size_t)n >= sizeof text) b->failed = 1;",
     "if (n < 0) b->failed = 1;"),
    ("support", "lorasynci_arena_array", "n ? n : 1", "n"),
    ("support", "lorasynci_hash", "if (num_bytes) h =", "if (0) h ="),
    ("support", "lorasynci_process_lives", "lorasynci_lock(fd, byte, F_WRLCK, 1) != 1", "1"),
    # -- json
    ("json", "lorasynci_json_plain", "(unsigned char)*p >= 0x20", "(unsigned char)*p >= 0x1f"),
    ("json", "lorasynci_json_string", "(unsigned char)*p < 0x20", "(unsigned char)*p < 0x1f"),
    ("json", "lorasynci_utf8", "low = 0xA0", "low = 0x80"),
    ("json", "lorasynci_utf8", "high = 0x8F", "high = 0xBF"),
    ("json", "lorasynci_json_unicode", "low < 0xDC00 || low > 0xDFFF", "low < 0xDC00"),
    ("json", "lorasynci_json_bracket", "j->depth == LORASYNCI_JSON_DEPTH", "j->depth == LORASYNCI_JSON_DEPTH + 1"),
    ("json", "lorasynci_json_more", "*j->at != ','", "*j->at == bracket"),
    ("json", "lorasynci_json_end", "j->at == j->end ?", "1 ?"),
    ("json", "lorasynci_json_fail", "line = p + 1", "line = p"),
    # -- dtype
    ("dtype", "lorasynci_convert_scaled",
     "lorasynci_float_to_bits(scale) != 0x3f800000u",
     "scale != 1.0f && scale < 2"),
    ("dtype", "lorasynci_round_short", "+ ((u >> shift) & 1u)", ""),
    ("dtype", "lorasynci_round_short", "u & 0x7fffffffu", "u"),
    ("dtype", "lorasynci_widen_scale", "0x00400000u", "0x00800000u"),
    ("dtype", "lorasynci_find_nonfinite", "if (!rule.sign) return lorasynci_find_ones(p, n);", ""),
    ("dtype", "lorasynci_finite_rule_of", "(inf) ? UINT64_C(1) << (mantissa) : 1", "UINT64_C(1) << (mantissa)"),
    ("dtype", "lorasync_convert", "num_elements % 8 * (size_t)lorasync_dtype_bits(src_dtype) % 8 != 0", "0"),
    ("dtype", "lorasynci_dtype_bytes", "+ n % 8 * bits / 8", ""),
    ("dtype", "lorasynci_finite_bytes_avx2",
     "lorasynci_finite_add_avx2(p + i + 96, mask, unit)",
     "lorasynci_finite_add_avx2(p + i + 64, mask, unit)"),
    # -- names
    ("names", "lorasynci_path_unwrap", "p->num > 1 && lorasynci_segment_is(p->seg[0], \"module\")", "0"),
    ("names", "lorasynci_is_wrapper", "|| lorasynci_segment_is(s, \"to_wrap\")", ""),
    ("names", "lorasynci_find_tail", "if (behind == 2 && !parameter) continue;", ""),
    ("names", "lorasynci_name_from_tail", "n->role != LORASYNC_ROLE_LORA_B", "0"),
    ("names", "lorasynci_tail_module", "i + 1 == to &&", ""),
    ("names", "lorasynci_has_lora_word", "|| lorasynci_is_capital(after)", ""),
    ("names", "lorasynci_is_megatron", "at + 3 == n &&", ""),
    ("names", "lorasync_drop_adapter", "end > m &&", ""),
    ("names", "lorasync_matcher_takes", "LORASYNC_ROLE_TRAINABLE_TOKENS", "LORASYNC_ROLE_BASE"),
    ("names", "lorasynci_path_split", "if (to == at)", "if (0)"),
    # -- layout
    ("layout", "lorasynci_chunk", "(length % world != 0)", "(length % world > 1)"),
    ("layout", "lorasync_even", "box.len[d] % world != 0", "0"),
    ("layout", "lorasync_range", "len > box.len[d] - off", "len > box.len[d]"),
    ("layout", "lorasync_fsdp1_layout", "use_orig_params ? world : 1", "1"),
    ("layout", "lorasync_fsdp1_layout", "use_orig_params ? 16 / itemsize : 1", "1"),
    ("layout", "lorasync_megatron_layout", "world / a * unit", "world * unit"),
    ("layout", "lorasync_flat_part", "p.in_shard = first - off;", "p.in_shard = 0;"),
    ("layout", "lorasynci_numel", "n > INT64_MAX / shape[d]", "0"),
    ("layout", "lorasynci_box_check", "b->len[d] > extent - b->off[d]", "b->len[d] > extent"),
    ("layout", "lorasynci_flat_boxes", "at % (inner * shape[k]) == 0 &&", ""),
    # -- comm
    ("comm", "lorasynci_local_check", "!lorasynci_process_lives(r->process, l->fd, peer)", "0"),
    ("comm", "lorasynci_local_check_sender", "if (moved) return LORASYNC_OK;", ""),
    ("comm", "lorasynci_flow_receive", "size != f->num_bytes ||", ""),
    ("comm", "lorasynci_flow_receive", "|| c->sizes[place] != n", ""),
    ("comm", "lorasynci_local_healthy", "if (now - seat->looked_ns < 10000000)", "if (1)"),
    ("comm", "lorasynci_local_given_up", "!= 2", "< 3"),
    ("comm", "lorasynci_flow_send", "< LORASYNCI_RING", "< LORASYNCI_RING + 1"),
    ("comm", "lorasynci_solo_exchange", "if (num_sends || num_receives)", "if (0)"),
    ("comm", "lorasynci_comm_ok", "&& c->rank < c->world", ""),
    ("comm", "lorasynci_nccl_fail", "r == ncclRemoteError ? LORASYNC_E_PEER : LORASYNC_E_COMM", "LORASYNC_E_COMM"),
    ("comm", "lorasynci_nccl_late", "n->lost = 1;", ""),
    # -- gpu
    ("gpu", "lorasynci_gpu_wait", "e == cudaSuccess && check ? check(user, err) : LORASYNC_OK", "LORASYNC_OK"),
    ("gpu", "lorasynci_gpu_wait", "check && (turns % 4096 == 0 || idle > LORASYNCI_YIELDS)", "0"),
    # -- talk
    ("talk", "lorasynci_count_votes", "i = world - 1; i >= 0; i--", "i = 0; i < world; i++"),
    ("talk", "lorasynci_count_votes", "votes[i].plan != votes[0].plan", "0"),
    ("talk", "lorasynci_count_votes", "votes[i].tag != votes[0].tag", "0"),
    ("talk", "lorasynci_count_votes", "n.all_flags &= votes[i].flags;", ""),
    ("talk", "lorasynci_talk_lose", "t->comm.abort(t->comm.user, err->text)", "(void)err"),
    ("talk", "lorasynci_talk_lose", "t->lost = status;", ""),
    ("talk", "lorasynci_talk_over", "timeout_ms > 0 ? timeout_ms : 60000", "60000"),
    # -- image
    ("image", "lorasynci_check_payload", "if (running == payload_bytes) return LORASYNC_OK;", "return LORASYNC_OK;"),
    ("image", "lorasynci_check_payload", "t->offset != running", "t->offset < running"),
    ("image", "lorasynci_check_payload", "size != t->num_bytes", "size < t->num_bytes"),
    ("image", "lorasynci_index_names",
     "lorasynci_tensor_name, m->tensors) != i",
     "lorasynci_tensor_name, m->tensors) > i"),
    ("image", "lorasynci_read_hex16", "strlen(text) != 16", "0"),
    ("image", "lorasynci_delta_metadata", "if (lorasync_image_metadata(image, keys[i])) continue;", "continue;"),
    ("image", "lorasynci_check_tensor", "strcmp(t->name, \"__metadata__\") == 0", "0"),
    ("image", "lorasynci_check_delta_base", "|| base->digest != d->base_digest", ""),
    ("image", "lorasynci_check_delta_base", "if (!base->has_digest)", "if (0)"),
    ("image", "lorasynci_merge_delta", "t->dtype != target->dtype ||", ""),
    ("image", "lorasync_image_apply", "status = lorasync_image_verify(delta, err);", "status = LORASYNC_OK;"),
    ("image", "lorasynci_fill_result", "status = lorasync_image_verify(full, err);", "status = LORASYNC_OK;"),
    ("image", "lorasynci_check_delta_source", "image->version <= base_version", "image->version < base_version"),
    ("image", "lorasynci_overlaps", "y - x < num_bytes", "y == x"),
    ("image", "lorasync_digest", "position % 256", "position % 128"),
    ("image", "lorasynci_parse", "n > num_bytes - 8", "n > num_bytes"),
    # -- plan
    ("plan", "lorasynci_check_overlap", "j = i + 1;", "j = i + 2;"),
    ("plan", "lorasynci_check_coverage", "sum != numel &&", "sum > numel &&"),
    ("plan", "lorasynci_choose_owner", "2 * has_mate", "0"),
    ("plan", "lorasynci_choose_owner", "p->load[rank] >= p->load[r[best].rank]", "1"),
    ("plan", "lorasynci_intersect", "if (first >= end) return 0;", "if (first > end) return 0;"),
    ("plan", None, "if (p->stride[d] == 0 && p->box.len[d] > 1)", "if (p->stride[d] == 0 && p->box.len[d] > 2)"),
    ("plan", "lorasynci_plan_facts",
     "lorasynci_put_fact(b, \"desc.allow_nan\", d->allow_nan);",
     ""),
    ("plan", "lorasynci_note_digest", "if (last.image_tensor == image_tensor) return LORASYNC_OK;", ""),
    ("plan", "lorasynci_route_owned", "x.digests = 0;", "x.digests = 1;"),
    ("plan", "lorasynci_route_wanted", "got != lorasynci_box_numel(want->box + ndim, ndim)", "0"),
    ("plan", "lorasynci_route_image_tensor", "if (r == end &&", "if (0 &&"),
    ("plan", None, "if (size > 3.4028234663852886e38 || (float)size == 0)", "if (size > 3.4028234663852886e38)"),
    ("plan", None, "if (p->scale != p->scale || p->scale - p->scale != 0)", "if (p->scale != p->scale)"),
    ("plan", None, "if (q.scale == 0) q.scale = 1;", ""),
    ("plan", None,
     "if (leg->wire != far.dtype && (leg->wire != leg->near.dtype || leg->scale != 1)) leg->via = leg->wire;",
     ""),
    ("plan", None, "if (!r->wanted && m->dtype != r->dtype)", "if (0)"),
    ("plan", None, "if (briefing->mapping_bytes && lorasynci_is_planner(m->plan)) shm_unlink(briefing->name);", ""),
    ("plan", None, "if (d->root < 0 || d->root >= plan->talk->comm.world)", "if (d->root < 0)"),
    # -- move
    ("move", "lorasynci_await_readers", "rank != plan->root", "rank == plan->root"),
    ("move", "lorasynci_run_op", "if (check && bad < 0)", "if (0)"),
    ("move", "lorasynci_run_op", "bad = at + (int64_t)hit", "bad = at"),
    ("move", None, "if (plan->sums) memset(plan->sums, 0, plan->catalogue.num * sizeof *plan->sums);", ""),
    ("move", None, "if (plan->image) plan->image->has_digest = 0;", ""),
    ("move", None,
     "if (round >= 2) LORASYNCI_CUDA(cudaStreamWaitEvent(g->wire, g->placed[round % 2], 0), "
     "\"cudaStreamWaitEvent\");",
     ""),
    ("move", None,
     "LORASYNCI_CUDA(cudaStreamWaitEvent(plan->gpu->caller, g->packed, 0), \"cudaStreamWaitEvent\");",
     ""),
    ("move", None, "(plan->id ^ lorasynci_run_tag(plan))", "(plan->id)"),
    ("move", None, "(ballots[i].bad != UINT64_MAX && !plan->allow_nan)", "0"),
    ("move", None, "if (plan->objection && plan->objection->status < 0) lorasynci_run_refuse(plan, plan->objection);",
     ""),
    ("move", "lorasynci_run_begin", "if (plan->mover->refuse) plan->mover->refuse(plan);", ""),
    # -- config
    ("config", "lorasynci_excluded", "if (lorasynci_ends_in(module, c->exclude.at[i])) return 1;", ""),
    ("config", "lorasync_config_scale", "config->info.use_rslora ? sqrt(rank) : rank", "rank"),
    ("config", "lorasynci_pair_check_rank", "rank == columns ||", "1 ||"),
    ("config", None, "if (c->info.use_dora != (pair->magnitude != NULL))", "if (0)"),
    ("config", None, "if (c->info.lora_bias != (pair->bias != NULL) && !pair->embedding_a)", "if (0)"),
    ("config", None, "if (found == expected ||", "if (found >= expected ||"),
    ("config", None, "if (rank < 1 || rank > INT32_MAX)", "if (rank < 0 || rank > INT32_MAX)"),
    ("config", None, "if (lorasynci_ends_in(module, dot ? owner : \"experts\")) return 1;", ""),
    ("config", None, "return a->order < b->order ? -1 : 1;", "return a->order > b->order ? -1 : 1;"),
    ("config", None,
     "if (fold && c->info.use_rslora) lorasynci_writer_field(w, \"use_rslora\", \"false\");",
     "if (0) lorasynci_writer_field(w, \"use_rslora\", \"false\");"),
    ("config", None, "if (bias) lorasynci_writer_field(w, \"lora_bias\", \"true\");", ""),
    # -- publish
    ("publish", "lorasynci_write_file", "if (!failed && !no_fsync) {", "if (0) {"),
    ("publish", None, "if (!m.reason && !d->no_fsync) {", "if (0) {"),
    ("publish", "lorasynci_settle_version", "if (!failed && !d->no_fsync) {", "if (0) {"),
    ("publish", "lorasynci_swing_latest", "if (!failed && !d->no_fsync) {", "if (0) {"),
    ("publish", "lorasynci_check_next", "if (version == held && same_bytes)", "if (version == held)"),
    ("publish", "lorasynci_may_commit",
     "if (lorasynci_now_ns() - p->start_ns < LORASYNCI_QUICK_NS) return 1;",
     "return 1;"),
    ("publish", None,
     "if (p->num_possible < p->need || p->lost.status < 0) return 0;",
     "if (p->lost.status < 0) return 0;"),
    ("publish", "lorasynci_remove_stale", "if (lorasynci_is_working_name(entry->d_name))", "if (0)"),
    ("publish", "lorasynci_is_working_name", "(name[n] == '-' || !name[n])", "1"),
    ("publish", "lorasynci_prune", "> (size_t)d->keep_versions &&", "> (size_t)d->keep_versions + 1 &&"),
    ("publish", None, "memcmp(d->chunk, p, step) != 0", "0"),
    ("publish", None, "p->outcomes[i].state != LORASYNC_ENGINE_STAGED", "0"),
    ("publish", "lorasynci_parse_version", "return v && strcmp(out->name, text) == 0;", "return v != 0;"),
    ("publish", None, "if (failed != EEXIST && failed != ENOTEMPTY) return failed;", "return failed;"),
    ("publish", "lorasynci_check_carries", "(t->carries & what) == what", "1"),
    # -- shm
    ("shm", "lorasynci_shm_name", "number << LORASYNCI_SHM_SLOT_BITS", "((uint64_t)1) << LORASYNCI_SHM_SLOT_BITS"),
    ("shm", "lorasynci_shm_commit", "|| p->version != version", ""),
    ("shm", "lorasynci_shm_bury", "if (owner) lorasynci_shm_reader_lives(s, i, owner);", ""),
    ("shm", "lorasynci_shm_is_used", "p->next == slot ||", ""),
    ("shm", "lorasynci_shm_trim", "i == except ||", ""),
    ("shm", "lorasynci_shm_add", "if (i < num) lorasynci_shm_unlink_name(s, i);", ""),
    ("shm", "lorasynci_shm_trim", "if (!lorasynci_shm_retire(s, i)) continue;", ""),
    ("shm", "lorasynci_shm_trim", "lorasynci_shm_is_marked(s->kept, i)", "0"),
    ("shm", "lorasynci_shm_take",
     "if (status == LORASYNC_OK && !lorasynci_shm_is_removed(out))",
     "if (status == LORASYNC_OK)"),
    ("shm", "lorasynci_shm_take_back", "if (!s->device && slot >= 0) lorasynci_shm_drop_slot(s, slot);", ""),
    ("shm", "lorasynci_shm_check_mine", "lorasynci_process_pid(s->own.mine) != (long)getpid()", "0"),
    ("shm", "lorasynci_shm_same", "|| memory[h->image_bytes + config - 1]", ""),
    ("shm", "lorasynci_shm_is_gone", "!h->memory.pointer ||", ""),
    ("shm", "lorasynci_shm_is_open", "if (lorasynci_shm_reader_lives(s, i, owner)) return 1;", ""),
    ("shm", "lorasynci_shm_have_payload", "__atomic_store_n(&g->retired, (uint64_t)0, __ATOMIC_SEQ_CST);", ""),
    ("shm", "lorasynci_shm_admit", "c->session != session)", "0)"),
    ("shm", "lorasynci_shm_abort", "s->places[i].version == version", "1"),
    ("shm", "lorasynci_shm_unused", "|| lorasynci_shm_is_used(s, i)", ""),
    ("gpu", "lorasynci_gpu_follow",
     "LORASYNCI_CUDA(cudaStreamWaitEvent(g->stream, g->ready, 0), \"cudaStreamWaitEvent\");",
     ""),
    ("shm", "lorasynci_shm_inherit", "&& !lorasynci_shm_is_used(s, i)", ""),
    # -- engine
    ("engine", "lorasynci_check_arrival", "!r->e->no_verify && !is_applied && image->has_digest", "0"),
    ("engine", "lorasynci_receive", "if (order < LORASYNCI_SAME) return", "if (0) return"),
    ("engine", "lorasynci_receive",
     "if (order == LORASYNCI_SAME && lorasynci_is_applied(r)) return LORASYNC_NOTHING_NEW;",
     ""),
    ("engine", "lorasynci_pin", "if (__atomic_load_n(&s->current, __ATOMIC_SEQ_CST) == i) return", "return"),
    ("engine", "lorasynci_check_names", "image->version && image->version != version", "0"),
    ("engine", "lorasynci_check_names", "image->adapter[0] && strcmp(image->adapter, adapter) != 0", "0"),
    ("engine", "lorasynci_is_checked", "|| strcmp(x->name, y->name) != 0", ""),
    ("engine", "lorasynci_is_checked", "|| strcmp(a->config_json, b->config_json) != 0", ""),
    ("engine", "lorasynci_hold_files", "memchr(h->config_json, 0, num_bytes)", "0"),
    ("engine", "lorasynci_check_delivery",
     "lorasynci_load_le64((const unsigned char *)d->bytes, 8) == d->num_bytes - 8",
     "1"),
    ("engine", "lorasynci_place_arrival", "if (e->adapter && strcmp(e->adapter, adapter) != 0)", "if (0)"),
    ("engine", "lorasynci_open_latest", "if (strcmp(latest.name, tried) == 0) break;", "if (tried[0]) break;"),
    ("engine", "lorasync_engine_offer", "if (status == LORASYNC_OK && !kept && d.release) d.release(d.user);", ""),
    # -- adapters that come and go
    ("publish", "lorasynci_number_withdrawal",
     "renameat(adapter_fd, name, adapter_fd, LORASYNCI_WITHDRAWN) != 0",
     "unlinkat(adapter_fd, name, 0) != 0"),
    ("publish", "lorasynci_stage_at", "lorasynci_remove_versions(lease, adapter_fd);", ";"),
    ("publish", "lorasynci_remove_versions", "if (!failed && one != ENOENT) failed = one;", ""),
    ("publish", "lorasynci_directory_holders", "&& receipt.version", ""),
    ("publish", "lorasynci_withdraw", "if (lorasynci_now_ns() >= deadline_ns)", "if (1)"),
    ("shm", "lorasynci_shm_name", "if (lorasynci_shm_is_withdrawn(old))", "if (0)"),
    ("shm", "lorasynci_shm_is_vacant", "&& s->places[i].slots < 0", ""),
    ("shm", "lorasynci_shm_is_used", "|| p->last == slot", ""),
    ("shm", "lorasynci_shm_withdraw", "lorasynci_shm_bury(s);", ""),
    ("shm", "lorasynci_shm_withdraw", "lorasynci_shm_trim(s, i, SIZE_MAX / 4, 0, -1);", ""),
    ("shm", "lorasynci_shm_grow", "*out = s->first_free = i;", "*out = i, s->first_free = i + 2;"),
    ("engine", "lorasynci_is_over", "other || (what->withdrawn && !s->is_withdrawn)", "other"),
    ("engine", "lorasynci_is_over", "s->is_found && (", "("),
    ("engine", "lorasynci_is_over", "if (over) s->dropped_version = 0;", ""),
    ("engine", "lorasynci_take_place", "if (s->from && s->current >= 0)", "if (0)"),
    ("engine", "lorasynci_take_place", "(s->from && what->withdrawn)", "0"),
    ("engine", "lorasynci_poll_adapter", "if (what->withdrawn && s->from != lorasynci_place_number(e))", "if (0)"),
    ("engine", "lorasynci_let_go", "if (!held && s->current < 0 && s->is_told)", "if (s->current < 0 && s->is_told)"),
    ("engine", "lorasynci_place_arrival", "if (is_offer) r->served->dropped_version = 0;", ""),
    ("engine", "lorasync_engine_next_change", "if (!s->next_changed) engine->last_changed = NULL;", ""),
    ("engine", "lorasynci_open_places", "if (lorasynci_place_of(d, i).source) e->places[i].source.close = NULL;", ""),
    ("session", "lorasynci_session_forget", "s->host.last_version = 0;", ""),
    # -- policy
    ("policy", "lorasynci_weights_lost",
     "if (s->keeps_memory || s->weights_backed_up) return 0;",
     "if (s->keeps_memory) return 0;"),
    ("policy", None, "if (s->held_digest != s->digest) return LORASYNC_ADAPTER_CHANGED;", ""),
    ("policy", None, "if (s->base_changed) return LORASYNC_BASE_CHANGED;", ""),
    ("policy", None, "s->ask_adapter || s->verify ? LORASYNC_ADAPTER_ASKED", "s->ask_adapter ? LORASYNC_ADAPTER_ASKED"),
    ("policy", "lorasync_policy_miles", "if (knobs->has_cuda_graph_tag) s.tags |= LORASYNC_MEMORY_CUDA_GRAPH;", ""),
    # -- session
    ("session", "lorasynci_fold", "&& add->role != LORASYNC_ROLE_LORA_B_BIAS", ""),
    ("session", "lorasynci_fold", "&& add->role != LORASYNC_ROLE_EMBEDDING_B", ""),
    ("session", None, "lorasynci_put_fact(b, \"desc.fold_scale\", d->fold_scale);", ""),
    ("session", None, 
     "return s->config ? lorasynci_config_facts(s->config, b, err) : LORASYNC_OK;",
     "return LORASYNC_OK;"),
    ("session", "lorasynci_session_scale", "piece->scale *= add->scale == 0 ? 1 : add->scale;", ""),
    ("session", None, "plan->id ^ plan->aimed_at", "plan->id"),
    ("session", None, "|| image->digest != s->last_digest", ""),
    ("session", None, "if (lorasynci_num_serving(o, num, s->host.last_version) < num) return 0;", ""),
    ("session", None, "if (!n.outcome.skipped) session->host.last_version = session->version;", ""),
    ("session", None, "if (at % (want->on_device ? 256 : 8))", "if (0)"),
    ("session", None, "if (!loan->id) return \"has no id\";", ""),
    ("session", None, "if (p->shape[d] != q->shape[d]) return 0;", ""),
    ("session", None,
     "if (name.role != LORASYNC_ROLE_LORA_B && name.role != LORASYNC_ROLE_EMBEDDING_B) continue;",
     "continue;"),
    ("session", None, "if (!behind_only) p.comm = &s->host.talk.comm;", ""),
    ("session", "lorasync_republish", "return lorasynci_talk_lose(&session->host.talk, status, err)", "return status"),
    # -- base
    ("base", None, "if (used && (used >= limit || g->list[i].num_bytes > limit - used))", "if (used && used >= limit)"),
    ("base", None, "if (c->num > known) *first = (uint32_t)i;", "*first = (uint32_t)i;"),
    ("base", None,
     "if (used > h->largest[bucket % 2]) h->largest[bucket % 2] = used;",
     "h->largest[bucket % 2] = used;"),
    ("base", None,
     "if (s->memory[0].payload) s->memory[1].payload = s->memory[0].payload + first;",
     "s->memory[1].payload = s->memory[0].payload;"),
    ("base", None, "if (n > 1) lorasynci_put_index(", "if (0) lorasynci_put_index("),
    ("base", None, "lorasynci_put_fact(b, \"desc.allow_nan\", s->desc.allow_nan);", ""),
    # -- device
    ("device", "lorasyncd_round_small", "m < over ? m : over", "m"),
    ("device", "lorasyncd_round_small", "if (e < -mantissa) return sign;", "if (e <= -mantissa) return sign;"),
    ("device", "lorasyncd_widen_small", "h >= over", "h > over"),
    ("device", "lorasyncd_widen_scale", "code == 0 ? 0x00400000u :", ""),
    ("device", "lorasyncd_convert", "if (scale != 1.0f) u =", "if (scale > 1.0f) u ="),
    ("device", "lorasyncd_factor", "(x ^ (x >> 31)) | 1u", "(x ^ (x >> 31))"),
    ("device", "lorasyncd_run", "|| (!wide && (w[i] >> 16 & mask) == mask)", ""),
    ("device", "lorasyncd_run", "lorasyncd_factor((lorasyncd_u64)at >> 8)", "lorasyncd_factor((lorasyncd_u64)at >> 9)"),
    ("device", "lorasyncd_advance", "if (*i1 >= o->n1) ++*i0, *i1 -= o->n1;", "if (*i1 > o->n1) ++*i0, *i1 -= o->n1;"),
]

CC = os.environ.get("CC", "cc")
FLAGS = "-std=gnu99 -O1 -w -DLORASYNC_STATIC= -DLORASYNC_IMPLEMENTATION=".split()
CUDA = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include")
LIBS = "-lm -lpthread -lrt".split()
TIMEOUT = 300
os.environ.setdefault("LORASYNC_TEST_SLOWNESS", "3")


def loosely(text):
    """A pattern for the text, whatever the white space between its words and signs."""
    return r"\s*".join(re.escape(part) for part in re.findall(r"\w+|[^\w\s]", text))


def span_of(header, function):
    """Where the definition of a function stands, or None."""
    for m in re.finditer(r"^(?:LORASYNC|static)[^\n;{}]*\b%s\([^;{}]*\)\s*\{" % re.escape(function), header, re.M):
        end = header.find("\n}\n", m.end())
        return m.start(), end + 2
    return None


def apply(header, mutant):
    """The header with the mutant in it, or None and why not."""
    room, function, old, new = mutant
    begin, end = 0, len(header)
    if function:
        span = span_of(header, function)
        if not span:
            return None, "no function " + function
        begin, end = span
    found = list(re.finditer(loosely(old), header[begin:end]))
    if len(found) != 1:
        return None, "its text is there %d times" % len(found)
    return header[: begin + found[0].start()] + new + header[begin + found[0].end():], None


class Bench:
    """A folder with one header, and the programs built from it."""

    def __init__(self, header):
        self.path = tempfile.mkdtemp(prefix="lorasync-mutant-")
        with open(os.path.join(self.path, "lorasync.h"), "w") as f:
            f.write(header)

    def build(self, program):
        out = os.path.join(self.path, program)
        if os.path.exists(out):
            return out
        cuda = ["-isystem", CUDA] if os.path.isdir(CUDA) else []
        command = [CC, *FLAGS, "-I" + self.path, "-Itests", *cuda, "-o", out, "tests/%s.c" % program, *LIBS]
        return None if subprocess.run(command, stderr=subprocess.DEVNULL).returncode else out

    def fails(self, built):
        """What a run says that failed, or an empty list. Whatever it has started ends with it."""
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            run = subprocess.Popen([built], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
            try:
                status = run.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                status = None
            try:
                os.killpg(run.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            if status is None:
                run.wait()
                return ["timeout"]
            log.seek(0)
            failed = re.findall(r"^FAIL (\S+)", log.read(), re.M)
            return failed or (["exit status %d" % status] if status else [])

    def remove(self):
        shutil.rmtree(self.path, ignore_errors=True)


def fails_again(bench, built, original, program, failed):
    """A test that fails in every run with the mutant and in none without, or None: then the machine was busy."""
    clean = original.build(program)
    failing = set(failed)
    for _ in range(2):
        failing &= set(bench.fails(built))
        failing -= set(original.fails(clean))
    return min(failing) if failing else None


def judge(header, mutant, original):
    """(verdict, by what): killed, survived, not applied."""
    mutated, why = apply(header, mutant)
    if mutated is None:
        return "not applied", why
    bench = Bench(mutated)
    try:
        for program in PROGRAMS[mutant[0]].split():
            if not os.path.exists("tests/%s.c" % program):
                continue
            built = bench.build(program)
            if not built:
                return "not applied", program + " does not compile with it"
            failed = bench.fails(built)
            if not failed:
                continue
            by = failed[0] if program not in TIMED else fails_again(bench, built, original, program, failed)
            if by:
                return "killed", "%s: %s" % (program, by)
        return "survived", ""
    finally:
        bench.remove()


def chosen(words):
    def fits(number, m):
        return not words or any(w in (m[0], str(number), m[1]) for w in words)
    return [(n, m) for n, m in enumerate(MUTANTS, 1) if fits(n, m)]


def main():
    args = sys.argv[1:]
    jobs = os.cpu_count() or 1
    if "-j" in args:
        at = args.index("-j")
        jobs = int(args[at + 1])
        del args[at: at + 2]
    header = open("lorasync.h").read()
    listing = "--list" in args
    todo = chosen([a for a in args if a != "--list"])
    if listing:
        for number, m in todo:
            why = apply(header, m)[1]
            print("%3d %-8s %s%s" % (number, m[0], m[1] or m[2], ": " + why if why else ""))
        return 0
    score = {room: [0, 0, 0] for room in PROGRAMS}
    survivors, missing = [], []
    original = Bench(header)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        verdicts = {pool.submit(judge, header, m, original): (n, m) for n, m in todo}
        for done in concurrent.futures.as_completed(verdicts):
            (number, m), (verdict, by) = verdicts[done], done.result()
            score[m[0]][("killed", "survived", "not applied").index(verdict)] += 1
            if verdict == "survived":
                survivors.append((number, m))
            if verdict == "not applied":
                missing.append((number, m, by))
            print("%3d %-8s %-11s %s: `%s` -> `%s`%s"
                  % (number, m[0], verdict, m[1] or "", m[2], m[3], " (%s)" % by if by else ""), flush=True)
    original.remove()
    print("\n%-10s %6s %8s %11s" % ("room", "killed", "survived", "not applied"))
    for room, (killed, survived, absent) in score.items():
        if killed + survived + absent:
            print("%-10s %6d %8d %11d" % (room, killed, survived, absent))
    for title, list_ in (("survived", [(n, m, "") for n, m in survivors]), ("not applied", missing)):
        for number, m, why in sorted(list_, key=lambda x: x[0]):
            print("%s: %d %s %s: `%s` -> `%s` %s" % (title, number, m[0], m[1] or "", m[2], m[3], why))
    killed, survived = sum(s[0] for s in score.values()), len(survivors)
    print("%d of %d killed (%.0f %%), %d not applied"
          % (killed, killed + survived, 100 * killed / max(killed + survived, 1), len(missing)))
    return 0 if killed >= 0.95 * (killed + survived) else 1


if __name__ == "__main__":
    sys.exit(main())
