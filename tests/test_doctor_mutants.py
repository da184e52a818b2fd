"""Bugs that a colleague might put into a kernel, one at a time: a row of `tinyvllm doctor` fails for each.

Each is an edit of the text that the device's compiler gets, in the simulator or on the CPU. The first one of a kernel is
tried always, and one of each seeded kind; the others are with --slow.
"""
import sys

import pytest

from tinyvllm.cli.doctor import run_check
from tinyvllm.cli.checks import checks_for
from tinyvllm.kernels.metal import Kernel

MEET = 'threadgroup_barrier(mem_flags::mem_threadgroup);'
ROUNDED = 'for (int e = 0; e < 2; e++) TOTAL.thread_elements()[e] = half(TOTAL.thread_elements()[e]);'
# device -> kernel -> (what goes wrong: row of the doctor, old text, new text, and which of several places)
MUTANTS = {'METAL': {
    'matvec_rows': {
        'the last row again is stored': ('simd.matvec[rows]', '&& first + r < N) y', ') y'),
        'rows behind the end are read': ('simd.matvec[rows]', 'min(first + r, N - 1)', 'first + r'),
        'the last columns left out': ('simd.matvec[rows]', 'k < K / PACK;', 'k < K / PACK - 1;'),
        'sums not initialised': ('simd.matvec[rows]', 'sums[r] = 0;', ''),
        'sums in half': (
            'simd.matvec[rows long]', 'sums[r] += product(ws[r][k], b);',
            'sums[r] = half(sums[r] + product(ws[r][k], b));')},
    'matvec_vector': {
        'one lane only': ('simd.matvec[vector]', 'sum = simd_sum(sum);', ''),
        'sums in half': ('simd.matvec[vector long]', 'float sum = 0;', 'half sum = 0;')},
    'matvec_coalesced': {
        'every other step': ('simd.matvec[coalesced]', 'k += 32', 'k += 64'),
        'sums in half': ('simd.matvec[coalesced long]', 'float sum = 0;', 'half sum = 0;')},
    'matvec_naive': {
        'the last column left out': ('simd.matvec[naive]', 'k < K;', 'k < K - 1;'),
        'rows of others written': ('simd.matvec[naive]', 'if (row >= N) return;', ''),
        'sums in half': ('simd.matvec[naive long]', 'float sum = 0;', 'half sum = 0;')},
    'kv_write': {
        'indices of 32 bits': (
            'simd.kv_write[farther]', 'const long to = long(slot) * ROW', 'const int to = slot * ROW'),
        'indices of 32 bits without a sign': (
            'simd.kv_write[farther]', 'const long to = long(slot) * ROW', 'const uint to = slot * ROW'),
        'values where keys belong': ('simd.kv_write', 'v_pool[to] = v[i];', 'v_pool[to] = k[i];'),
        'the last token forgotten': ('simd.kv_write', 'i >= TOKENS * ROW', 'i >= TOKENS * ROW - ROW')},
    'decode_simple': {
        'a stale maximum': ('simd.decode_simple', 'top = higher;', ''),
        'its own key is not seen': ('simd.decode_simple', 'p <= last', 'p < last'),
        'query heads dealt out to KV heads': ('simd.decode_simple', 'head / (H / KV)', 'head % KV'),
        'lanes without a number take part': (
            'simd.decode_simple', 'mine ? dot(query, float4(k[at])) : 0.0f', 'dot(query, float4(k[at]))'),
        'indices of 32 bits': (
            'simd.decode_simple[farther]', 'const long slot = long(table[p / S])',
            'const int slot = int(table[p / S])'),
        'weights summed in half': (
            'simd.decode_simple[long]', 'weight = weight * keep + add;', 'weight = half(weight * keep + add);')},
    'paged_decode': {
        'a stale maximum': ('softmax.decode', 'm[g] = top;', ''),
        'keys behind the end have a weight': ('softmax.decode', 'tile + i < last ? x[g][0] : MASKED', 'x[g][0]'),
        'no barrier before the merge': ('softmax.decode', MEET, '', 1),
        'simdgroups merged without their maxima': ('softmax.decode', 'fast::exp2(tops[a][g] - top)', '1.0f'),
        'query heads dealt out to KV heads': ('softmax.decode', 'kv = head / (H / KV)', 'kv = head % KV'),
        'sums not initialised': ('softmax.decode', 's[g] = 0.0f;', ''),
        'old values in the old unit': ('softmax.decode[long]', 'o[g] *= shrink;', ''),
        'old weights in the old unit': ('softmax.decode[long]', 's[g] * shrink', 's[g]'),
        'no scale': ('softmax.decode', '* D4 + n]) * SCALE', '* D4 + n])'),
        'block 0 for all': ('softmax.decode', 'table[KEY(tile) / S] * S', '0 * S'),
        'indices of 32 bits': (
            'softmax.decode[farther]', '(long)simd_shuffle(mine, group + j) * D4',
            'simd_shuffle(mine, group + j) * D4'),
        'values by indices of 32 bits': ('softmax.decode[farther]', 'const long at = simd', 'const int at = simd'),
        'values summed in half': ('softmax.decode[long]', 'a[j], o[g]);', 'a[j], float4(half4(o[g])));')},
    'merge_partials': {
        'the last part left out': ('softmax.decode_split[part=32]', '+ PART - 1) / PART', ') / PART'),
        'parts not brought to one unit': (
            'softmax.decode_split[part=32]', '* fast::exp2(part[a * (D4 + 1) + D4].x - top)', ''),
        'no barrier': ('softmax.decode_split[part=32]', MEET, ''),
        'another token': ('softmax.decode_split[part=32]', 'row = tg.y * H + tg.x', 'row = tg.x * H + tg.y')},
    'flash_tiled': {
        'a stale maximum': ('flash.flash[tiled]', 'top[r] = m;', ''),
        'a token sees those behind it': ('flash.flash[tiled]', '<= past + (mine + r) / HEADS', '<= past + mine + r'),
        'keys overwritten while they are used': ('flash.flash[tiled]', MEET, '', 2),
        'old values in the old unit': ('flash.flash[tiled]', 'total[r][c] *= fix;', ';'),
        'padding left as it was': ('flash.flash[tiled]', 'o[ROW(i / D) + i % D] = T(0.0f);', ';'),
        'an odd array before the tile': (
            'flash.flash[tiled]', 'alignas(16) threadgroup T queries',
            'threadgroup half odd[1]; if (index == 0) odd[0] = 0; threadgroup T queries'),
        'indices of 32 bits': ('flash.flash[tiled far]', '* KV + kv) * (long)D)', '* KV + kv) * D)'),
        'values summed in half': (
            'flash.flash[tiled long]', 'total[r][c] += w * value[c];',
            'total[r][c] = half(total[r][c] + w * value[c]);')},
    'flash_matrix': {
        'a stale sum': ('flash.flash[matrix]', 'sum *= fix;', ''),
        'its own key is not seen': ('flash.flash[matrix]', '+ column + e <= past', '+ column + e < past'),
        'next tile over this one': ('flash.flash[matrix]', MEET + '\n      FETCH', 'FETCH'),
        'not turned': ('flash.flash[matrix]', 'ulong2(0), true', 'ulong2(0), false'),
        'half of a row joined': ('flash.flash[matrix]', 'm = max(m, simd_shuffle_xor(m, 8));', ''),
        'another layout of lanes': ('flash.flash[matrix]', 'lane % 2 * 2;', 'lane % 2 * 4;'),
        'rows of others written': ('flash.flash[matrix]', '    if (row < rows)\n', ''),
        'an odd array before the tile': (
            'flash.flash[matrix]', 'alignas(16) threadgroup half keys',
            'threadgroup half odd[1]; if (index == 0) odd[0] = 0; threadgroup half keys'),
        'indices of 32 bits': ('flash.flash[matrix far]', '* KV + kv) * (long)D)', '* KV + kv) * D)'),
        'values summed in half': (
            'flash.flash[matrix long]', 'w, value, total[i]);',
            'w, value, total[i]); ' + ROUNDED.replace('TOTAL', 'total[i]'))},
    'linear_lanes': {
        'scale of the wrong group': ('linear_gpu.gpu_linear[lanes int4-g32]', 'k / GROUP]', 'k / GROUP / 2]'),
        'the last columns left out': ('linear_gpu.gpu_linear[lanes f16]', 'k < K; k += 32', 'k + STEP < K; k += 32'),
        'rows of others written': ('linear_gpu.gpu_linear[lanes f16]', '&& n < OUT', ''),
        'tokens of others written': ('linear_gpu.gpu_linear[lanes f16]', '&& at < TOTAL', ''),
        'squares used before they are there': ('linear_gpu.gpu_linear[lanes f16]', MEET, '', 0),
        'no epsilon': ('linear_gpu.gpu_linear[lanes f16]', '+ EPS', ''),
        'zero of the format': ('linear_gpu.gpu_linear[lanes int4-g32]', '-8.0f', '-7.0f'),
        'gate and up swapped': ('linear_gpu.gpu_swiglu[lanes]', 'silu(v) * (up)', 'silu(up) * (v)'),
        'bias of another row': ('linear_gpu.gpu_linear[lanes f16]', 'value(bias[n])', 'value(bias[n ? n - 1 : 0])'),
        'residual of another token': (
            'linear_gpu.gpu_linear[lanes f16]', 'long(t) * OUT + n', 'long(t ? t - 1 : 0) * OUT + n'),
        'sums in half': (
            'linear_gpu.gpu_linear[lanes f16 long]', 'sums[r][t] += WEIGHT(now[r], part[r][t], ones[t]);',
            'sums[r][t] = half(sums[r][t] + WEIGHT(now[r], part[r][t], ones[t]));'),
        'sums of quantised weights in half': (
            'linear_gpu.gpu_linear[lanes int4-g32 long]', 'float sums[ROWS][TOKENS];', 'half sums[ROWS][TOKENS];'),
        'indices of 32 bits': ('linear_gpu.gpu_linear[lanes f16 far]', 'long row, int k', 'int row, int k'),
        'codes by indices of 32 bits': (
            'linear_gpu.gpu_linear[lanes int4-g32 far]', 'long row, int k', 'int row, int k'),
        'upper bits in the wrong place': ('linear_gpu.gpu_linear[lanes q6_k]', 'i / 2 * 2', 'i % 2 * 2'),
        'the minimum of another group': ('linear_gpu.gpu_linear[lanes q4_k]', 'scales[at + 1]', 'scales[at]')},
    'linear_tiles': {
        'tile used before it is there': ('linear_gpu.gpu_linear[tiles f16]', MEET, '', 0),
        'next tile over this one': ('linear_gpu.gpu_linear[tiles f16]', MEET, '', 1),
        'sums read before they are there': ('linear_gpu.gpu_linear[tiles f16]', MEET, '', 2),
        'tokens of nobody read': ('linear_gpu.gpu_linear[tiles f16]', 't0 + r < TOKENS && ', ''),
        'rows of others written': ('linear_gpu.gpu_linear[tiles f16]', ' && n < OUT', ''),
        'columns of nobody read': (
            'linear_gpu.gpu_linear[tiles f16]', 'k0 + k < K)\n        token', 'true)\n        token'),
        'codes without their scale': (
            'linear_gpu.gpu_linear[tiles int4-g32]', 'WEIGHT(weight[c], four(weight[c], q), 1.0f)',
            'four(weight[c], q)'),
        'gates and ups swapped': ('linear_gpu.gpu_swiglu[tiles]', 'AFTER(v[0], v[8]', 'AFTER(v[8], v[0]'),
        'sums in half': (
            'linear_gpu.gpu_linear[tiles f16 long]',
            'simdgroup_multiply_accumulate(total[m][n], a[m], b, total[m][n]);',
            '{ simdgroup_multiply_accumulate(total[m][n], a[m], b, total[m][n]); '
            + ROUNDED.replace('TOTAL', 'total[m][n]') + ' }'),
        'indices of 32 bits': ('linear_gpu.gpu_linear[tiles f16 far]', 'long row, int k', 'int row, int k')},
    'embed_rows': {
        'a token that is none': ('linear_gpu.gpu_embed', 'clamp(tokens[at], 0, N - 1)', 'tokens[at]'),
        'the piece of a neighbour': ('linear_gpu.gpu_embed', 'mine = k % STEP / WIDE', 'mine = 0'),
        'indices of 32 bits': ('linear_gpu.gpu_embed[f16 far]', 'long row, int k', 'int row, int k'),
        'indices of 32 bits without a sign': ('linear_gpu.gpu_embed[q6_k far]', 'long row, int k', 'uint row, int k')},
    'all_rows': {
        'threads behind the end': (
            'linear_gpu.launch_rows[all]', 'if (long(i) >= long(TOKENS) * (K / WIDE)) return;', ''),
        'indices of 32 bits': ('linear_gpu.launch_rows[far]', 'long(at) * K', 'at * K')},
    'rms_norm': {
        'squares used before they are there': ('linear_tiles.rms_norm', MEET, ''),
        'a sum, not a mean': ('linear_tiles.rms_norm', 'sum / float(K)', 'sum'),
        'no epsilon': ('linear_tiles.rms_norm', '+ EPS', ''),
        'a simdgroup left out': ('linear_tiles.rms_norm', 's < SIMDS; s++', 's < SIMDS - 1; s++'),
        'squares in half': ('linear_tiles.rms_norm', 'sum += dot(v, v);', 'sum = half(sum + dot(v, v));'),
        'indices of 32 bits': ('linear_tiles.rms_norm[far]', 'long(token) * K', 'int(token) * K')},
    'rope_write': {
        'the other way round': ('fused.rope_write', 'a * c - b * s', 'a * c + b * s'),
        'neighbours turned, not halves': ('fused.rope_write', 'float(x[i + D / 2]) * scale', 'float(x[i + 1]) * scale'),
        'padding is stored': ('fused.rope_write', 'if (head >= H && slot < 1) return;', ''),
        'the slot of another sequence': ('fused.rope_write', 'slot < 1', 'slot < 3'),
        'the weight of queries for keys': ('fused.rope_write', 'head < H ? q_norm : k_norm', 'q_norm'),
        'the first angle for all': ('fused.rope_write', 'cosines[t * (D / 2) + i]', 'cosines[i]'),
        'indices of 32 bits': (
            'fused.rope_write[far]', '(long(slot) * KV + head - H) * D', '(slot * KV + head - H) * D')},
    'prepare': {
        'a token is fed to the wrong place': ('inputs.PREPARE', '&& i + 1 == x[STARTS + row + 1]', ''),
        'the first replay for all': ('inputs.PREPARE', '+ row] + later', '+ row]'),
        'the slot of another block': ('inputs.PREPARE', 'at / BLOCK] * BLOCK', 'i / BLOCK] * BLOCK'),
        'another staging buffer': ('inputs.PREPARE', 'slot / STEPS * SIZE', '0 * SIZE'),
        'no barrier': (
            'inputs.PREPARE', '#define BARRIER threadgroup_barrier(mem_flags::mem_device);', '#define BARRIER')},
    'apply_constraints': {
        'the first buffer for all': ('masks.apply_constraints', 'slot * ROWS + row', 'row'),
        'a bit beside': ('masks.apply_constraints', '>> i % 32', '>> (i + 1) % 32'),
        'edits of another tile': ('masks.apply_constraints', 'edited[e] >= from && ', ''),
        'no barrier': ('masks.apply_constraints', 'threadgroup_barrier(mem_flags::mem_device);', ''),
        'behind the vocabulary': ('masks.apply_constraints', 'min(from + TILE, V)', 'from + TILE'),
        'indices of 32 bits': ('masks.apply_constraints[far]', 'logits + long(row) * V', 'logits + row * V')},
    'penalties': {
        'negative logits divided': (
            'penalties.apply_penalties', 'x > 0 ? x / repetition : x * repetition', 'x / repetition'),
        'presence for the prompt': ('penalties.apply_penalties', 'counts[e] ? presence : 0.0f', 'presence'),
        'no barrier': ('penalties.apply_penalties', 'threadgroup_barrier(mem_flags::mem_device);', ''),
        'one entry too many': ('penalties.apply_penalties', 'e < begins[row + 1]', 'e <= begins[row + 1]'),
        'indices of 32 bits': (
            'penalties.apply_penalties[far]', 'const long at = long(row) * V', 'const int at = int(row) * V')},
    'sample': {
        'NaN passes': ('sampler.sample_tokens', '> 0x7f800000u ||', '> 0x7fffffffu ||'),
        'ties of zeros': ('sampler.sample_tokens', '~b + (b == 0x80000000u)', '~b'),
        'one token too many': ('sampler.sample_tokens', 'a.count >= count', 'a.count + 1 >= count'),
        'the temperature forgotten': ('sampler.sample_tokens', '(x[i] - top) / TEMPERATURE', 'x[i] - top'),
        'log-probabilities of edited logits': ('sampler.sample_tokens', 'exp(y - higher)', 'exp(x[i] - higher)'),
        'a forced token is drawn': ('sampler.sample_tokens', 'if (TOP_K < 0) best', 'if (false) best'),
        'a stale maximum': ('sampler.sample_tokens', 'peak = higher;', ''),
        'no barrier': (
            'sampler.sample_tokens', 'sums[me] = mine;\n    threadgroup_barrier(mem_flags::mem_threadgroup);',
            'sums[me] = mine;'),
        'sums in half': (
            'sampler.sample_tokens[far]', 'add = add * exp(peak - higher) + exp(y - higher);',
            'add = half(add * exp(peak - higher) + exp(y - higher));'),
        'indices of 32 bits': (
            'sampler.sample_tokens[far]', '*x = logits + long(row) * V', '*x = logits + int(row) * V')},
    'top_tokens': {
        'ties once': ('top_tokens.find_top_tokens', 'k == last && i > after', 'false'),
        'logits, not differences': ('top_tokens.find_top_tokens', 'of_key(best) - top', 'of_key(best)'),
        'the last token left out': ('top_tokens.find_top_tokens', 'i < V; i += 32', 'i < V - 1; i += 32'),
        'indices of 32 bits': ('top_tokens.find_top_tokens[far]', 'logits + long(row) * V', 'logits + int(row) * V')},
    'publish': {
        'the step id before the data': (
            'sampled_tokens.PUBLISH', 'const int step_id = step_counter[0];',
            'const int step_id = step_counter[0]; if (me == 0) slots[step_id % NUM_STEPS * SIZE] = step_id;'),
        'no barrier before the step id': ('sampled_tokens.PUBLISH', 'threadgroup_barrier(mem_flags::mem_device);', ''),
        'a barrier for the other memory': (
            'sampled_tokens.PUBLISH', 'mem_flags::mem_device', 'mem_flags::mem_threadgroup'),
        'the first 256 rows only': ('sampled_tokens.PUBLISH', 'i < ROWS; i += 256', 'i < ROWS && i < 256; i += 256'),
        'the first slot for all': ('sampled_tokens.PUBLISH', 'step_id % NUM_STEPS * SIZE', '0')}},
 'CPU': {
    'matmul': {
        'the last row again is stored': ('cpu.matmul', 'r < ROWS && n + r < N', 'r < ROWS'),
        'the last columns left out': ('cpu.matmul', 'k + LANES <= K', 'k + LANES < K')},
    'kv_write': {
        'values where keys belong': ('cpu.kv_write', 'value[i] = v[', 'value[i] = k['),
        'indices of 32 bits': (
            'cpu.kv_write[far]', '*key = k_pool + (long)slots[t] * ROW', '*key = k_pool + (int)(slots[t] * ROW)')},
    'attend': {
        'a stale maximum': ('cpu.attend', ', *top = m;', ';'),
        'its own key is not seen': ('cpu.attend[prefill]', 'first + 1 - start', 'first - start'),
        'query heads dealt out to KV heads': ('cpu.attend', 'int r = h * GROUP;', 'int r = h;'),
        'indices of 32 bits': (
            'cpu.attend[far]', '((long)table[known / SLOTS] * SLOTS + p % SLOTS) * KV * D',
            '(int)((table[known / SLOTS] * SLOTS + p % SLOTS) * KV * D)')},
    'linear': {
        'scale of the wrong group': (
            'linear_cpu.cpu_linear[int4-g32]', 'row->scale[k / GROUP]', 'row->scale[k / GROUP / 2]'),
        'the bias of the first rows': ('linear_cpu.cpu_linear[f16]', 'load(bias + n + i)', 'load(bias + i)'),
        'no epsilon': ('linear_cpu.cpu_linear[f32]', 's / K + EPS', 's / K'),
        'rows of others written': ('linear_cpu.cpu_linear[q6_k]', 'least(LANES, N - n - i)', 'LANES'),
        'indices of 32 bits': (
            'linear_cpu.cpu_linear[int4-g32 far]', 'row->w = codes + n * (K / 2)',
            'row->w = codes + (int)(n * (K / 2))')},
    'swiglu': {
        'gate and up swapped': (
            'linear_cpu.cpu_swiglu', 'silu(load(out + i)) * load(out + OUTPUTS + i)',
            'silu(load(out + OUTPUTS + i)) * load(out + i)')},
    'embed': {
        'a token that is none': ('rows_cpu.cpu_embed', 'if ((uint)tokens[t] >= N) continue;', ''),
        'indices of 32 bits': (
            'rows_cpu.cpu_embed[f16 far]', 'row->w = weight + n * K', 'row->w = weight + (int)(n * K)')},
    'rope_write': {
        'the other way round': ('fused.rope_write', 'a * cosine[i] - b * sine[i]', 'a * cosine[i] + b * sine[i]'),
        'padding is stored': ('fused.rope_write', 'if (slots[t] < 1) continue;', '')},
    'prepare': {'the first replay for all': ('inputs.PREPARE', '+ row] + later', '+ row]')},
    'apply_constraints': {'a bit beside': ('masks.apply_constraints', 'word >> bit & 1', 'word >> (bit + 1) % 32 & 1')},
    'penalties': {'one entry too many': ('penalties.apply_penalties', 'e < begins[r + 1]', 'e <= begins[r + 1]')},
    'sample': {'a forced token is drawn': ('sampler.sample_tokens', 'if (TOP_K < 0) best', 'if (0) best')},
    'top_tokens': {
        'ties backwards': ('top_tokens.find_top_tokens', 'x[i] - top > best[j - 1]', 'x[i] - top >= best[j - 1]')},
    'publish': {'the first slot for all': ('sampled_tokens.PUBLISH', 'step_counter[0] % NUM_STEPS * SIZE', '0')}}}
SEEDED = 'indices of 32 bits', 'half', 'step id', 'odd array'    # kinds of which each must be tried always


def cases():
    "All mutants; the first one of a kernel, and one of each seeded kind, are tried always."
    seen = set()
    for device, kernels in MUTANTS.items():
        for kernel, mutants in kernels.items():
            for i, (what, mutant) in enumerate(mutants.items()):
                kind = next(((device, kind) for kind in SEEDED if kind in what), None)
                is_first = i < 1 or kind and kind not in seen
                seen.add(kind)
                marks = [] if is_first else [pytest.mark.slow]
                if device == 'METAL':
                    marks.append(pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one'))
                yield pytest.param(device, kernel, *mutant, id=f'{device}-{kernel}-{what}', marks=marks)


def replaced(text, old, new, which=None):
    "All places, or the n-th."
    if which is None: return text.replace(old, new)
    parts = text.split(old)
    return old.join(parts[:which + 1]) + new + old.join(parts[which + 1:])


def find_trouble(device, row) -> str:
    "What the doctor says of the types of a row; empty if nothing."
    check, = [c for c in checks_for(device) if c.name == row]
    return next((r.trouble for r in (run_check(check, dtype, device, 12) for dtype in check.dtypes) if not r.ok), '')


@pytest.mark.parametrize('device, kernel, row, old, new, which', [
    pytest.param(*(p.values + (None,))[:6], id=p.id, marks=p.marks) for p in cases()])
def test_the_doctor_catches_it(device, kernel, row, old, new, which, monkeypatch):
    source, changed = Kernel.source, []

    def edited(self, *args):
        text = source(self, *args)
        if self.signature.name != kernel or old not in text: return text
        changed.append(kernel)
        return replaced(text, old, new, which)
    monkeypatch.setattr(Kernel, 'source', edited)
    monkeypatch.setattr('tinyvllm.cli.doctor.measure_launch', lambda *_: (None, None))
    trouble = find_trouble(device, row)
    assert changed, 'the text is not there'
    assert trouble and 'does not compile' not in trouble, trouble
