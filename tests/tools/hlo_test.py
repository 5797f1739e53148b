"""Reading compiled programs: what XLA prints, cut down to what is read."""

import pytest

from ultramem_jax.tools import hlo

# As for a TPU: an all-gather in three steps (its start, one beside a matmul,
# its end), and a reduce-scatter, which is an all-reduce inside a fusion.
TPU = """HloModule jit_f, is_scheduled=true

%fused_start (p0: bf16[128,64]) -> (bf16[128,64], bf16[128,256], u32[]) {
  %p0 = bf16[128,64]{1,0} parameter(0)
  %all-gather.1 = bf16[128,256]{1,0} all-gather(%p0), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={1}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/jvp(Transformer)/memory_0/all_gather"}
  ROOT %custom-call.1 = (bf16[128,64], bf16[128,256], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_step (p0: bf16[128,64], p1: bf16[8,8]) -> bf16[8,8] {
  %p1 = bf16[8,8]{1,0} parameter(1)
  %convolution.1 = bf16[8,8]{1,0:T(8,128)(2,1)} convolution(%p1, %p1), dim_labels=bf_io->bf
  %all-gather.2 = bf16[128,256]{1,0} all-gather(%p0), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}
  ROOT %tuple = (bf16[8,8]) tuple(%convolution.1)
}

%fused_done (p0: bf16[128,64]) -> bf16[128,256] {
  %all-gather.3 = bf16[128,256]{1,0} all-gather(%p0), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[128,256] custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (p0: f32[16,8]) -> f32[4,8] {
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%p0), channel_id=5, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %i)
}

ENTRY %main (a: bf16[128,64], b: bf16[8,8]) -> f32[4,8] {
  %a = bf16[128,64]{1,0} parameter(0)
  %start = (bf16[128,64], bf16[128,256], u32[]) fusion(%a), kind=kCustom, calls=%fused_start
  %step = (bf16[8,8]) fusion(%a, %b), kind=kCustom, calls=%fused_step, metadata={op_name="jit(f)/jvp(Transformer)/block_1/mlp/up/dot_general"}
  %done = bf16[128,256] fusion(%start), kind=kCustom, calls=%fused_done
  ROOT %scattered = f32[4,8]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_collective_in_steps_is_one():
  found = hlo.Program(TPU).collectives(16)
  assert [(x.opcode, x.group, x.count) for x in found] == [
    ("all-gather", 4, 1),
    ("reduce-scatter", 4, 1),
  ]
  gathered, scattered = 128 * 256 * 2, 4 * 8 * 4
  assert found[0].received == gathered * 3 / 4  # its own quarter it had
  assert found[1].received == scattered * 3  # a part from each other device


def test_what_runs_beside_a_collective():
  (overlap,) = hlo.Program(TPU).overlaps()
  assert overlap.opcode == "all-gather"
  assert "memory_0" in overlap.op_name
  assert overlap.meanwhile == (
    "jit(f)/jvp(Transformer)/block_1/mlp/up/dot_general",
  )


# Elsewhere an operation is started and awaited by name.
PAIR = """HloModule jit_f

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[8,8]) -> f32[32,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %all-gather-start = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %early = f32[8,8]{1,0} dot(%a, %a), metadata={op_name="jit(f)/early"}
  %all-gather-done = f32[32,8]{1,0} all-gather-done(%all-gather-start)
  %late = f32[8,8]{1,0} dot(%a, %a), metadata={op_name="jit(f)/late"}
  %all-reduce-start = f32[8,8]{1,0} all-reduce-start(%late), to_apply=%add
  %all-reduce-done = f32[8,8]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %out = f32[32,8]{1,0} add(%all-gather-done, %all-reduce-done)
}
"""  # noqa: E501


def test_start_and_done():
  program = hlo.Program(PAIR)
  gather, reduce = program.collectives(8)
  assert (gather.group, gather.received) == (4, 32 * 8 * 4 * 3 / 4)
  # Names no group: all devices. Sent and received once around each way.
  assert (reduce.group, reduce.received) == (8, 8 * 8 * 4 * 2 * 7 / 8)
  # The second waits at once: nothing runs beside it.
  (overlap,) = program.overlaps()
  assert overlap == hlo.Overlap("all-gather", "", ("jit(f)/early",))


LOOP = """HloModule jit_f

%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %collective-permute = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %next = (s32[], f32[64]) tuple(%i, %collective-permute)
}

%condition (s: (s32[], f32[64])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]) parameter(0)
  ROOT %while = (s32[], f32[64]) while(%s), condition=%condition, body=%bodyANNOTATION
}
"""  # noqa: E501


@pytest.mark.parametrize(
  "annotation, count",
  [
    ("", 7),  # the bound that the condition tests
    (', backend_config={"known_trip_count":{"n":"5"}}', 5),
  ],
)
def test_a_collective_in_a_loop_counts_each_time(annotation, count):
  text = LOOP.replace("ANNOTATION", annotation)
  (found,) = hlo.Program(text).collectives(2)
  assert (found.count, found.received) == (count, count * 64 * 4)


@pytest.mark.parametrize(
  "groups, size",
  [
    ("{{0,1},{2,3}}", 2),
    ("[2,8]<=[16]", 8),
    ("mesh['x'=2,'y'=8] {'x'}", 2),
    ("mesh['x'=2,'y'=8] {'x','y'}", 16),
    ("mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'x'}", 2),
    ("mesh['x'=2,'y'=8] {'y':(2)4}", 4),  # part of an axis
  ],
)
def test_group_sizes(groups, size):
  text = PAIR.replace("{{0,1,2,3},{4,5,6,7}}", groups)
  assert hlo.Program(text).collectives(16)[0].group == size
