"""Bad input at every public door, met by our own sentence: run in an interpreter without the tests' shape checking, as users do.

A row is what the user typed and the start of what they read. Run as a script, this file prints what each row gives.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import mechsvd as ms
from mechsvd.edits.gates import Gate
from mechsvd.experiments import statistics

ROWS = {
    # what is no model
    "ms.Task.from_text('embedded', 'hi')": "TypeError: `model` must be a TransformerLens model, but is 'embedded'; get one by",
    "ms.collect_writes('gpt2', task)": "TypeError: `model` must be a TransformerLens model",
    "ms.self_check(torch.nn.Linear(2, 2))": "TypeError: `model` must be a TransformerLens model",
    "ms.measure(task, model, [ms.chain()])": "TypeError: `model` must be a TransformerLens model",
    # what is no task
    "ms.sweep_rank(model, 'text', svd)": "TypeError: A task is needed, but this is str 'text'",
    "len(ms.measure(model, [task, task], [ms.chain()]))": 2,
    "ms.collect_writes(model, None)": "TypeError: A task is needed, but this is NoneType",
    "ms.Task(tokens=[1, 2, 3], prompt_length=1)": "TypeError: `tokens` must be a tensor of token ids, but is list",
    "ms.Task(tokens=torch.tensor([0.5, 1.0]), prompt_length=1)": "TypeError: `tokens` must be token ids (whole numbers)",
    "ms.Task(tokens=torch.tensor([[0, 5]]), prompt_length=1)": "ValueError: `tokens` must have one axis, [pos], but their shape is [1, 2]",
    "ms.Task(tokens=torch.tensor([0, 5]), prompt_length=0.5)": "ValueError: `prompt_length` is 0.5",
    "ms.Task(tokens=torch.tensor([0, 5]), prompt_length=1, pieces=('a',))": "ValueError: `pieces` has 1 texts for 2 tokens",
    "ms.Task.from_text(model, ['hi', 'you'])": "TypeError: `prompt` must be a string, but is list ['hi', 'you']. A list of texts makes tasks by `tasks_from`.",
    "ms.Task.from_text(model, None)": "TypeError: `prompt` must be a string, but is NoneType",
    "ms.Task.from_text(model, 'hi', 5)": "TypeError: `continuation` must be a string, but is int",
    "ms.Task.from_text(model, 'hi', truncate='right')": "ValueError: `truncate` is 'right', but must be 'left'",
    # layers, components, positions
    "ms.collect_writes(model, task, layers=[99])": "KeyError: No layers [99]: the model has layers 0–5",
    "ms.collect_writes(model, task, layers='0')": "KeyError: No layers ['0']",
    "ms.collect_writes(model, task, layers=True)": "KeyError: No layers [True]",
    "ms.collect_writes(model, task, missing='ignore')": "ValueError: `missing` is 'ignore'",
    "ms.collect_writes(model, '')": "ValueError: `prompt` is empty",
    "ms.collect_writes(model, [task, 3])": "TypeError: Task 1 is int '3'",
    "ms.collect_writes(model, task, positions=3.5)": "TypeError: `positions` is 3.5; give a whole number, a list or range",
    "ms.collect_writes(model, task, positions='first')": "TypeError: `positions` is 'first', but the only word is 'last'",
    "ms.collect_writes(model, task, positions=[1.5])": "TypeError: `positions` must be whole numbers, but holds 1.5",
    "ms.fwd_hooks(model, ms.chain(), positions=torch.arange(9) > 3)": "ValueError: `positions` is a mask, which depends on the length of the text",
    "ms.measure(model, task, [ms.chain()], positions=[False, True])": "TypeError: `positions` must be whole numbers, but holds False",
    "ms.measure(model, task, [ms.chain()], positions=[-99])": "ValueError: No positions [-99]: the text has 0 to",
    # edits
    "ms.keep(8)": "TypeError: A basis must be a Subspace, a Decomposition or a tensor",
    "ms.keep(svd.directions[:, :4] * 2)": "ValueError: A basis must have orthonormal columns",
    "ms.keep(svd.directions[:, :4].T)": "ValueError: A basis holds directions as columns",
    "ms.gate(svd, [1.0, 2.0])": "ValueError: `gains` has shape [2], but the basis has 128 directions",
    "ms.shift(torch.ones(2, 2))": "ValueError: `vector` must be finite and of shape [d_model], but has shape [2, 2]",
    "ms.measure(model, task, [ms.shift(torch.ones(64))])": "ValueError: The edit failed at layer 0 attn: `vector` has 64 entries",
    "ms.fwd_hooks(model, None)": "TypeError: An edit must be a function of the writes, but this is NoneType",
    "ms.measure(model, task, [svd.subspace(2)])": "TypeError: An edit must be a function of the writes, but this is Subspace",
    "ms.measure(model, task, [])": "TypeError: `edits` must be an edit, a stack of gates or a list of edits, at least one",
    "len(ms.measure(model, task, ms.chain()).log_prob)": 1,
    "ms.measure(model, task, [ms.keep(torch.eye(64))])": "ValueError: The edit's basis has d_model 64, but the model's is 128",
    "ms.measure(model, task, [ms.gate(svd, torch.ones(3, 128))])": "ValueError: A stack of gates cannot be one of a list",
    "ms.measure(model, task, [ms.chain()], batch_size=0)": "ValueError: `batch_size` is 0",
    # estimates
    "ms.estimate_ranking('gpt2', task, svd)": "TypeError: `model` must be a TransformerLens model",
    "ms.estimate_ranking(model, 'text', svd)": "TypeError: A task is needed, but this is str 'text'",
    "ms.estimate_ranking(model, task, writes)": "TypeError: `svd` must be a Decomposition, but is Writes",
    "ms.estimate_ranking(model, task, svd, 3)": "ValueError: `order` is 3, but must be 1, 2 or 'path'",
    "ms.estimate_ranking(model, task, svd, True)": "ValueError: `order` is True, but must be 1, 2 or 'path'",
    "ms.estimate_ranking(model, task, svd, torch.ones(2))": "ValueError: `order` is tensor([1., 1.]), but must be 1, 2 or 'path'",
    "ms.estimate_ranking(model, task, svd, verify=5)": "ValueError: `verify` is 5, but must be a share from 0 to 1",
    "ms.estimate_ranking(model, task, svd, products=3)": "ValueError: `products` are Hessian products, which only order 2 takes",
    "ms.estimate_ranking(model, task, svd, 2, products=0)": "ValueError: `products` is 0, but must be a whole number of at least 1",
    "ms.estimate_ranking(model, task, svd, 'path', steps=0)": "ValueError: `steps` is 0, but must be",
    "ms.estimate_ranking(model, task, svd, calibrate=1)": "TypeError: `calibrate` is 1, but must be True or False",
    "ms.estimate_ranking(model, task, svd, seed='x')": "ValueError: `seed` is 'x', but must be",
    "ms.estimate_ranking(model, task, svd, verfy=1)": "TypeError: `estimate_ranking` has no option `verfy`: did you mean `verify`?",
    "ms.estimate_ranking(model, task, svd, baseline=3)": "TypeError: `baseline` must be a Baseline, but is int",
    "ms.refine_ranking(model, task, svd, svd)": "TypeError: A RankingEstimates is needed here, but this is Decomposition",
    "ms.refine_ranking(model, task, svd, ms.estimate_ranking(model, task, svd), 2)": "ValueError: `budget` is 2, but must be a share from 0 to 1",
    "ms.refine_ranking(model, task, svd, ms.estimate_ranking(model, task, svd), top=0)": "ValueError: `top` is 0, but must be a whole number from 1 to 128",
    "ms.estimate_ranking(model, task, svd).agreement(129)": "ValueError: `top` is 129, but must be a whole number from 1 to 128",
    "ms.estimate_ranking(model, task, svd).agreement(confidence=2)": "ValueError: `confidence` is 2, but must be from 0.5 to below 1",
    "ms.figures.estimated_effects(svd)": "TypeError: A RankingEstimate is needed here, but this is Decomposition",
    # edits in the weights
    "ms.fold('gpt2', ms.keep(svd), 'out')": "TypeError: `model` must be a TransformerLens model",
    "ms.folded('gpt2', ms.keep(svd)).__enter__()": "TypeError: `model` must be a TransformerLens model",
    "ms.fold(model, svd, 'out')": "TypeError: Only gates and chains of them can be folded into weights, but this is Decomposition",
    "ms.fold(model, ms.keep(svd), 5)": "TypeError: `out` must be a path, but is 5",
    "ms.fold(model, ms.keep(svd), '.', task)": f"FileExistsError: {Path.cwd()} holds files that `fold` did not write",
    "ms.fold(model, ms.keep(svd), 'out', 'text')": "TypeError: A task is needed, but this is str 'text'",
    "ms.fold(model, ms.keep(svd), 'out', task, position=[1])": "TypeError: `fold` has no option `position`: did you mean `positions`?",
    "ms.folded(model, ms.keep(svd, 3), positions=[1]).__enter__()": "ValueError: `positions` cannot be folded",
    "ms.folded(model, ms.keep(svd, 3), batch_size=1)": "TypeError: `folded` has no option `batch_size`",
    # decompositions and sweeps
    "ms.decompose(np.ones((2, 3, 4)))": "TypeError: `writes` must be what `collect_writes` gives",
    "ms.decompose([task])": "TypeError: `writes` must be what `collect_writes` gives",
    "ms.decompose(torch.ones(2, 3, 4, dtype=torch.complex64))": "ValueError: `writes` must be a non-empty float tensor",
    "svd.subspace(1.0)": "ValueError: `rank` is 1.0, but the decomposition has 128 directions",
    "svd.subspace(np.int64(3)).rank": 3,
    "ms.sweep_ridge(model, task, ms.decompose(writes, per_layer=True))": "TypeError: `svd` must be one Decomposition here, but is 6 of them",
    "ms.sweep_rank(model, task, [svd, 3])": "TypeError: `svd` must be a Decomposition, but holds int",
    "ms.sweep_rank(model, task, [])": "ValueError: The list is empty, so there are no directions",
    "ms.sweep_rank(model, task, [svd, svd])": "ValueError: Bases 0 and 1 are both of blocks.0.hook_attn_out",
    "ms.sweep_rank(model, task, ms.decompose(writes, per='site')[:3])": "KeyError: No basis is of layer 1 mlp",
    "ms.sweep_rank(model, task, ms.decompose(writes, per='site'), ranks=[24])": "ValueError: `ranks` holds [24], but the decomposition has 23 directions",
    "ms.keep(ms.decompose(writes, per='site'), 24)": "ValueError: `rank` is 24, but there are 23 directions",
    "ms.keep(svd, -1)": "ValueError: `rank` is -1, but there are 128 directions",
    "ms.keep([torch.eye(128)])": "ValueError: Basis 0 does not say to which sites it belongs",
    "ms.gate(ms.decompose(writes, per='site'), torch.ones(23))": "ValueError: There are 12 bases, but 23 gains",
    "ms.keep(ms.decompose(writes, per='site'), 3)(torch.ones(1, 128))": "KeyError: No basis is of the site that was not named",
    "ms.decompose(writes, per='head')": "ValueError: `per` is 'head', but must be 'pool', 'layer' or 'site'",
    "ms.decompose(torch.ones(2, 3, 4), per='site')": "ValueError: `per='site'` needs to know the sites",
    "ms.decompose(writes, scale='rms')": "ValueError: `scale` is 'rms', but must be 'site', 'norm' or None",
    # cards of directions
    "ms.describe(model, writes, [0], task)": "TypeError: `svd` must be a Decomposition, but is Writes",
    "ms.describe(model, svd, 3, task)": "TypeError: `directions` must be a list of whole numbers, but is int",
    "ms.describe(model, svd, [128], task)": "ValueError: `directions` are [128], but must be different ones from 0 to 127",
    "ms.describe(model, svd, [0], 'I believe')": "TypeError: A task is needed, but this is str 'I believe'",
    "ms.describe(model, task, [0], svd)": "TypeError: `svd` must be a Decomposition, but is Task",
    "ms.describe(model, svd, [0], task, at='blocks.0.hook_resid_post')": "ValueError: `at` is 'blocks.0.hook_resid_post', but a card tells what writes do",
    "ms.describe(model, svd, [0], task, metric='kl')": "TypeError: `metric` must be a function of logits, clean logits and task",
    "ms.describe(model, svd, [0], task, seed=-1)": "ValueError: `seed` is -1",
    # metrics
    "ms.measure(model, task, [ms.chain()], metric='kl')": "TypeError: `metric` must be a function of logits, clean logits and task, but is 'kl'",
    "ms.measure(model, task, [ms.chain()], metric=lambda l, c, t: l)": "ValueError: The metric `metric` returned shape [2, 20, 1024] for 2 edits",
    "ms.measure(model, task, [ms.chain()], metric=lambda l, c, t: 1.0)": "TypeError: The metric `metric` returned float, but must return a tensor of floats",
    "ms.measure(model, task, [ms.chain()], metric=lambda l, c, t: l.argmax(-1)[:, 0])": "TypeError: The metric `metric` returned torch.int64",
    "ms.measure(model, task, [ms.chain()], metric=lambda l, c, t: l[:, 0, 0] / 0)": "ValueError: The metric `metric` returned ",
    "ms.measure(model, task, [ms.chain()], metric=lambda l, c, t: l.mul_(2)[:, 0, 0])": "ValueError: The metric `metric` changed its logits in place",
    "ms.measure(model, task, [ms.chain()], metric=ms.logit_difference())": "ValueError: The task has no choice: make it by `Task.from_choice",
    "ms.logit_difference(' to')": "ValueError: `logit_difference` needs both `right` and `wrong`, or neither",
    "ms.measure(model, task, [ms.chain()], metric=ms.logit_difference(' to find joy', ' a'))": "ValueError: `right` must be one token, but ' to find joy' has 3",
    "ms.measure(model, task, [ms.chain()], metric=ms.logit_difference(5, 5000))": "ValueError: Token ids run from 5000 to 5000, but the model has 0 to 1023",
    "ms.measure(model, task, [ms.chain()], metric=ms.logit_difference(5, 1.5))": "TypeError: `wrong` must be a text or token ids, but holds 1.5",
    "ms.measure(model, task, [ms.chain()], metric=ms.logit_difference(5, []))": "ValueError: `wrong` of a logit difference is empty",
    "ms.Task.from_choice(model, 'I believe', ' the', ' the')": "ValueError: Tokens [",
    "ms.Task.from_choice(model, 'I believe', [], ' the')": "ValueError: `right` is empty",
    "ms.Task.from_choice(model, 'I believe', 3, ' the')": "TypeError: `right` must be a text or a list of texts, but is int",
    "ms.hessian_attribution(model, task, svd, objective='log_prob', metric=ms.kl_divergence)": "ValueError: `objective` and `metric` are two functions",
    "ms.critical_rank(model, task, svd, -1.0, metric=ms.kl_divergence)": "ValueError: An effect of -1.0 cannot be allowed",
    "ms.kl_at_most(-1)": "ValueError: A divergence of -1 nats cannot be allowed",
    "ms.change_at_most('x')": "ValueError: A change of 'x' nats cannot be allowed",
    # baselines
    "ms.keep(svd, 3, baseline=torch.ones(128))": "TypeError: `baseline` must be a Baseline, but is Tensor",
    "ms.mean_baseline(svd)": "TypeError: A Writes is needed here, but this is Decomposition",
    "ms.mean_baseline(writes, by='token')": "ValueError: `by` is 'token', but must be 'site' or 'position'",
    "ms.mean_baseline(ms.collect_writes(model, task, skip_bos=True), by='position')": "ValueError: The writes of text 0 lack positions",
    "ms.resample_baseline(writes)": "ValueError: Text 0 is the only one of 23 tokens",
    "ms.resample_baseline(ms.collect_writes(model, [task, task]))": "ValueError: Text 0 is the only one of 23 tokens",
    "ms.donor_baseline(model, task, positions=[3])": "ValueError: A donor gives all positions",
    "ms.keep(torch.eye(64)[:, :2], baseline=ms.mean_baseline(writes))": "ValueError: The baseline has points of 128 entries, but the directions have 64",
    "ms.rank_directions(model, task, svd, baseline=ms.mean_baseline(ms.collect_writes(model, task, layers=[0])))": "KeyError: The mean of each site has no point for layer 1 attn",
    "ms.measure(model, task, ms.keep(svd, 3, baseline=ms.donor_baseline(model, ms.Task(tokens=task.tokens[:9], prompt_length=5))))": "ValueError: The writes of a donor has 9 positions, but the text has 23",
    "ms.compare_baselines(model, task, svd, [])": "TypeError: `baselines` must be baselines by name",
    # other hook points
    "ms.collect_writes(model, task, at='blocks.*.hook_resid_pots')": "KeyError: No hook point matches 'blocks.*.hook_resid_pots'",
    "ms.collect_writes(model, task, at='blocks.0.attn.hook_pattern')": "ValueError: `blocks.0.attn.hook_pattern` holds [1, 8, 5, 5] for one text of 5 tokens",
    "ms.collect_writes(model, task, at=['blocks.0.hook_resid_post', 'blocks.0.mlp.hook_post'])": "ValueError: The hook points have several shapes after [batch, pos]: [352] (blocks.0.mlp.hook_post), [128] (blocks.0.hook_resid_post)",
    "ms.collect_writes(model, task, at='blocks.0.attn.hook_z', heads=[8])": "KeyError: No heads [8]: `blocks.0.attn.hook_z` has heads 0–7.",
    "ms.collect_writes(model, task, at='blocks.0.hook_resid_post', heads=[0])": "ValueError: `blocks.0.hook_resid_post` has no axis of heads",
    "ms.collect_writes(model, task, heads=[0])": "ValueError: `heads` needs `at`",
    "ms.collect_writes(model, task, at='blocks.0.hook_resid_post', components=['mlp'])": "ValueError: `components` chooses writes and `at` other hook points",
    "ms.collect_writes(model, task, at='blocks.1.hook_resid_post', layers=[0])": "ValueError: No hook point is left of ['blocks.1.hook_resid_post']",
    "ms.collect_writes(model, task, at=[3])": "TypeError: `at` must be names or patterns of hook points, but has 3",
    "ms.measure(model, task, [ms.keep(svd, 3)], at='blocks.0.attn.hook_z')": "ValueError: The edit's basis has d_model 128, but blocks.0.attn.hook_z[0] holds 16",
    # many texts, and tables of numbers
    "ms.measure(model, [task, 'text'], [ms.chain()])": "TypeError: Task 1 is str 'text'",
    "ms.sweep_rank(model, [], svd)": "ValueError: No tasks: the list is empty",
    "ms.sweep_rank(model, [task], svd, ranks=[3]).summary()": "ValueError: An interval needs at least two texts",
    "ms.fit_and_measure(model, [task])": "ValueError: There is 1 text or group, but held-out texts need at least two",
    "ms.tasks_from(model, 3)": "TypeError: `source` must be a file or a list of texts, but is int",
    "ms.tasks_from(model, ['hi', 4])": "TypeError: text 1 must be a prompt, a pair",
    "ms.contrast(model, {'a': [task]})": "ValueError: ",
    "ms.null('noise', like=svd)": "KeyError: No null 'noise': choose ",
    "ms.measure_faithfulness(model, task, svd, 128)": "ValueError: `kept` is 128, but must be different directions from 0 to 127",
    "ms.rank_directions(model, task, svd, after=[128])": "ValueError: `after` is [128], but must be directions of a single basis",
    # doses
    "ms.dose_response(model, task, svd, [0, 0])": "ValueError: `directions` are [0, 0], but must be different ones from 0 to 127",
    "ms.dose_response(model, task, svd, [128])": "ValueError: `directions` are [128], but must be",
    "ms.dose_response(model, task, svd, [0], gains=[1])": "ValueError: `gains` must be finite numbers, not only 1",
    "ms.dose_response(model, task, svd, [0], gains=['a'])": "TypeError: `gains` must be a list of numbers",
    # directions of weights, subspaces of TransformerLens
    "ms.weight_svd('gpt2', '*')": "TypeError: `model` must be a TransformerLens model",
    "ms.weight_svd(model, 'blocks.0.attn.q.weight')": "ValueError: `blocks.0.attn.q.weight` of shape [128, 128] is not what TransformerLens names",
    "ms.to_transformer_lens(torch.eye(4))": "TypeError: A Subspace is needed here, but this is Tensor",
    "ms.from_transformer_lens(torch.eye(3))": "TypeError: `basis` must be a SubspaceBasis of TransformerLens, but is Tensor",
    "ms.sweep_rank(model, task, ms.decompose(torch.zeros(2, 3, 128)))": "ValueError: This decomposition has no directions",
    "ms.rank_directions(model, task, writes)": "TypeError: `svd` must be a Decomposition, but is Writes",
    "ms.sweep_rank(model, task, svd, ranks='all')": "ValueError: `ranks` must be a list of whole numbers, but is 'all'",
    "ms.sweep_rank(model, task, svd, ranks=[True, 2])": "ValueError: `ranks` must be a list of whole numbers",
    "ms.sweep_rank(model, task, svd, ranks=[1.5])": "ValueError: `ranks` must be a non-empty list of whole numbers",
    "ms.sweep_rank(model, task, svd, order=[0, 0])": "ValueError: `order` must name each of the 128 directions once",
    "len(ms.sweep_rank(model, task, svd, ranks=[1], order=np.arange(128)[::-1]).order)": 128,
    "ms.figures.writer_map(svd, ms.collect_writes(model, task, layers=[0]))": "ValueError: The decomposition is of [12, ",
    # the smallest rank
    "ms.critical_rank(model, 'text', svd)": "TypeError: A task is needed, but this is str 'text'",
    "ms.critical_rank(model, task, writes)": "TypeError: `svd` must be a Decomposition, but is Writes",
    "ms.critical_rank(model, task, svd, float('nan'))": "ValueError: A drop of nan nats cannot be allowed",
    "ms.critical_rank(model, task, svd, criterion='greedy')": "TypeError: `criterion` must be a function of a measurement, but is 'greedy'",
    "ms.critical_rank(model, task, svd, order=[0, 1])": "ValueError: `order` must name each of the 128 directions once",
    "ms.critical_rank('gpt2', task, svd)": "TypeError: `model` must be a TransformerLens model",
    "ms.critical_rank_of(task)": "TypeError: A RankSweep is needed here, but this is Task",
    # text
    "ms.generate('gpt2', 'hi')": "TypeError: `model` must be a TransformerLens model",
    "ms.generate(model, None)": "TypeError: `prompt` must be a string, but is NoneType",
    "ms.generate(model, task.tokens[None])": "ValueError: `prompt` must be text, or token ids of shape [pos], but is torch.int64 of shape [1, ",
    "ms.generate(model, torch.ones(3))": "ValueError: `prompt` must be text, or token ids of shape [pos], but is torch.float32 of shape [3]",
    "len(ms.generate(model, ['a', 'b'], max_new_tokens=1))": 2,
    "ms.generate(model, 'hi', svd.subspace(2))": "TypeError: An edit must be a function of the writes, but this is Subspace",
    "ms.generate(model, 'hi', [])": "TypeError: `edits` must be an edit, a stack of gates or a list of edits, at least one",
    "ms.generate(model, 'hi', ms.keep(torch.eye(64)))": "ValueError: The edit's basis has d_model 64, but the model's is 128",
    "ms.generate(model, 'hi', max_new_tokens=1.5)": "ValueError: `max_new_tokens` is 1.5, but must be a whole number of at least 1",
    "ms.generate(model, 'hi', temperature='hot')": "ValueError: `temperature` is 'hot'",
    "ms.generate(model, 'hi', temperature=float('nan'))": "ValueError: `temperature` is nan",
    "ms.generate(model, 'hi', seed=None)": "ValueError: `seed` is None",
    "ms.generate(model, 'hi', layers=[99])": "KeyError: No layers [99]: the model has layers 0–5",
    "ms.generate(model, 'hi', positions=[-1])": "ValueError: No positions [-1]: the length of the text is not known here",
    "ms.generate(model, 'hi', truncate='right')": "ValueError: `truncate` is 'right', but must be 'left'",
    "ms.generate(model, 'hi', lambda x, hook: x[:, :1])": "EditError: The edit at layer 0 attn returned",
    "len(ms.generate(model, 'hi', max_new_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int64(2))) > 2": True,
    # subspaces compared
    "ms.overlap([svd.subspace(2)])": "ValueError: 1 subspace(s) given, but it takes two to compare.",
    "ms.overlap(svd.subspace(2))": "TypeError: `subspaces` must be a list of subspaces, but is Subspace",
    "ms.overlap([svd.subspace(2), svd])": "TypeError: Subspace 1 is Decomposition",
    "ms.overlap([svd.subspace(2), ms.span(torch.eye(64))])": "ValueError: Subspace 1 lies in 64 dimensions, but the first in 128",
    "ms.pool([svd.subspace(2)] * 2, draws=0)": "ValueError: `draws` is 0",
    "ms.random_subspace(4, 5)": "ValueError: `rank` is 5, but must be from 0 to `d_model` = 4",
    "ms.random_subspace(4, True)": "ValueError: `rank` is True",
    "ms.pool([svd.subspace(2)] * 2, seed='a')": "ValueError: `seed` is 'a'",
    "statistics.interval([1.0, 2.0])": "TypeError: `values` must be a float tensor with one row per text, but is list.",
    "statistics.interval(torch.tensor([1, 2]))": "TypeError: `values` must be a float tensor with one row per text, but is torch.int64 of shape [2].",
    "statistics.interval(torch.tensor(1.0))": "TypeError: `values` must be a float tensor with one row per text, but is torch.float32 of shape [].",
    # results of another kind
    "ms.figures.margins(svd)": "TypeError: A CriticalRank is needed here, but this is Decomposition",
    "ms.figures.surprise(3)": "TypeError: A RankSweep is needed here, but this is int",
    "ms.figures.direction_effects(svd)": "TypeError: A Ranking is needed here, but this is Decomposition",
    "ms.figures.overlap_map([])": "TypeError: An Overlap is needed here, but this is list",
    "ms.figures.race_of_orders([])": "TypeError: A Mapping is needed here, but this is list",
    "ms.order_by_effect(svd)": "TypeError: A Ranking is needed here, but this is Decomposition",
    "ms.order_at_random(128)": "TypeError: `svd` must be a Decomposition, but is int",
    "ms.sweep_rank(model, task, svd, ranks=5)": "TypeError: `ranks` must be a list of whole numbers, but is int",
    "ms.sweep_rank(model, task, svd, order=task)": "TypeError: `order` must be a list of whole numbers, but is Task",
    "ms.critical_rank(model, task, svd, criterion=ms.drop_at_most)": "ValueError: A drop of Measurement nats cannot be allowed",
    "ms.generate(model, 'hi', positions=[5000])": "ValueError: No positions [5000]: the text has 0 to ",
    "ms.shift(svd.subspace(1))": "TypeError: `vector` must be a tensor [d_model], but is Subspace; a direction is a column of `svd.directions`",
    "ms.chain([ms.keep(svd, 3)])": "TypeError: `chain` takes edits, `chain(first, second)`, but one is list.",
    "ms.generate(model, 'hi', torch.ones(128))": "TypeError: An edit must be a function of the writes, but this is Tensor; make one by `mechsvd.keep`, or by `mechsvd.shift` of a vector.",
    "ms.measure(model, task, ms.shift(torch.zeros(128))).log_prob.shape[0]": 1,
    "ms.measure(model, task, ms.keep(ms.span(torch.eye(10, 128))))": "ValueError: The edit's basis has d_model 10, but the model's is 128. Vectors that are rows make a subspace by `span(vectors, rows=True)`.",
    "ms.measure(model, task, ms.keep(svd, 3), metric=ms.logit_difference)": "TypeError: `logit_difference` makes a metric; write `metric=logit_difference()`.",
    "ms.critical_rank(model, task, svd, criterion=ms.kl_at_most)": "ValueError: A divergence of Measurement nats cannot be allowed: `kl_at_most` takes a number, 0 or more; write `kl_at_most(0.1)`.",
    "ms.same_greedy_text(None)": "TypeError: The criterion 'same_greedy_text' needs a Measurement; give it to `critical_rank` as it is.",
    "ms.generate_tasks(model, 'hi', None)": "TypeError: `edits` must be an edit, a stack of gates or a list of edits, at least one, but is NoneType",
    "ms.load_model(dtype='float32')": "TypeError: `dtype` must be a floating torch.dtype",
    # attribution
    "ms.hessian_attribution('gpt2', task, svd)": "TypeError: `model` must be a TransformerLens model",
    "ms.hessian_attribution(model, task, None)": "TypeError: `over` must be a decomposition (its gains), sites of the model",
    "ms.hessian_attribution(model, task, [])": "TypeError: `over` must be a decomposition",
    "ms.hessian_attribution(model, task, 3)": "TypeError: `over` must be a decomposition",
    "ms.hessian_attribution(model, task, (svd, svd))": "TypeError: `over` must be a decomposition",
    "ms.hessian_attribution(model, task, 'blocks.2.mpl.*')": "KeyError: No weight matches 'blocks.2.mpl.*': patterns are shell-like, such as 'blocks.2.mlp.*'; close matches: ['blocks.2.mlp.in.weight'",
    "ms.hessian_attribution(model, task, ['*', 'W_E'])": "KeyError: No weight matches 'W_E'",
    "ms.hessian_attribution(model, task, 'blocks.2.ln1.weight', layers=[2])": "ValueError: `layers` says where gains act, but `over` names weights",
    "ms.hessian_attribution(model, task, ms.find_sites(model), components=['mlp'])": "ValueError: `components` says where gains act",
    "ms.hessian_attribution(model, task, ms.find_sites(model), positions=[999])": "ValueError: No positions [999]: the text has 0 to",
    "ms.hessian_attribution(model, task, ms.Site(9, 'mlp', 'blocks.9.hook_mlp_out'))": "KeyError: This model does not write at ['blocks.9.hook_mlp_out']",
    "ms.hessian_attribution(model, task, svd, objective='logprob')": "ValueError: `objective` is 'logprob', but must be 'probability' or 'log_prob'",
    "ms.hessian_attribution(model, task, svd, pairs=129)": "ValueError: `pairs` is 129, but w has 128 entries; choose 1 to 128",
    "ms.hessian_attribution(model, task, svd, pairs=True)": "ValueError: `pairs` is True, but w has 128 entries",
    "ms.hessian_attribution(model, task, svd, pairs=2.5)": "ValueError: `pairs` is 2.5, but w has 128 entries",
    "ms.hessian_attribution(model, task, svd, bases={'mine': torch.eye(64)})": "ValueError: The basis 'mine' has columns of 64 entries, but w has 128",
    "ms.hessian_attribution(model, task, svd, bases={'mine': torch.ones(128, 2)})": "ValueError: A basis must have orthonormal columns",
    "ms.hessian_attribution(model, task, svd, bases={'random': torch.eye(128)})": "ValueError: `bases` names one 'random', which is always there",
    "ms.hessian_attribution(model, task, svd, bases=torch.eye(128))": "TypeError: `bases` must be bases by name, such as {'mine': basis}, but is Tensor",
    "ms.hessian_attribution(model, task, svd, tolerance='x')": "ValueError: `tolerance` is 'x', but must be a number above 0",
    "ms.hessian_attribution(model, task, svd, path_steps=0)": "ValueError: `path_steps` is 0, but must be a whole number of at least 1",
    "ms.hessian_attribution(model, task, svd, max_products=0)": "ValueError: `max_products` is 0",
    "ms.hessian_attribution(model, task, svd, seed='x')": "ValueError: `seed` is 'x', but must be a whole number of at least 0",
    "ms.hessian_attribution(model, task, svd, batch_size=0)": "ValueError: `batch_size` is 0, but must be",
    "ms.hessian_attribution(model, task, svd, basis='random')": "ValueError: `basis` is 'random', but must be one of ['largest', 'from_w'",
    "ms.hessian_attribution(model, task, svd, basis='from_w', max_products=9)": "ValueError: `max_products` is for `basis='largest'`; 'from_w' takes one product per pair",
    "ms.interactions(model, task, svd, torch.eye(128))": "TypeError: `bases` must be bases by name, such as {'mine': basis}, but is Tensor",
    "ms.interactions(model, task, svd, {})": "ValueError: There are no bases; give at least one by its name",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, rows=1)": "ValueError: The basis 'a' has 1 chosen direction(s), but pairs need at least 2",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, rows=[0, 128])": "ValueError: `rows` are [0, 128], but must be different numbers from 0 to 127, those of the basis 'a'",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, rows=[3, 3])": "ValueError: `rows` are [3, 3], but must be different numbers",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, rows=0)": "TypeError: `rows` must be a list of whole numbers, but is int",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, draws=0)": "ValueError: `draws` is 0, but must be a whole number of at least 1",
    "ms.interactions(model, [], svd, {'a': torch.eye(128)})": "ValueError: No tasks: the list is empty",
    "ms.interactions(model, task, svd, {'a': torch.eye(128)}, objective='log')": "ValueError: `objective` is 'log', but must be",
    "ms.interactions(model, task, svd, ms.hessian_attribution(model, task, svd, pairs=2, path_steps=1), order='size')": "ValueError: `order` is 'size', but must be one of ['eigenvalue', 'projection', 'measured']",
    "ms.interactions_of(torch.prod, torch.ones(2), {'a': torch.eye(3)})": "ValueError: The basis 'a' has columns of 3 entries, but w has 2: a vector",
    "ms.interactions_of(torch.prod, torch.ones(2), {'a': torch.eye(2)}).summary('size')": "ValueError: `of` is 'size', but must be 'interaction' or 'relative'",
    "ms.figures.interactions(svd)": "TypeError: An Interactions is needed here, but this is Decomposition",
    "ms.figures.accumulated_shares({})": "ValueError: There are no attributions to compare",
    "ms.figures.accumulated_shares({'a': 3}, order='size')": "ValueError: `order` is 'size', but must be one of",
    "ms.shrink_by_curvature(model, task, svd, svd)": "TypeError: An Attribution is needed here, but this is Decomposition",
    "ms.shrink_by_curvature(model, task, svd, ms.hessian_attribution(model, task, svd, pairs=2, path_steps=1), [-1.0])": "ValueError: `alphas` must be finite numbers from 0, at least one",
    "ms.shrink_by_curvature(model, task, svd, ms.hessian_attribution(model, task, svd, pairs=2, path_steps=1), rest='x')": "ValueError: `rest` is 'x', but must be a finite number",
    "ms.figures.curvature_ridge(svd)": "TypeError: A CurvatureRidge is needed here, but this is Decomposition",
    "ms.hessian_attribution_of(3, torch.ones(2))": "TypeError: `function` must be a function of one vector, but is int",
    "ms.hessian_attribution_of(torch.sum, [1.0, 2.0])": "ValueError: `w` must be a float tensor with one axis, but is list",
    "ms.hessian_attribution_of(torch.sum, torch.ones(2, 2))": "ValueError: `w` must be a float tensor with one axis, but is torch.float32 of shape [2, 2]",
    "ms.hessian_attribution_of(torch.exp, torch.ones(2))": "ValueError: `function` must give a scalar tensor (no `.item()`), but gives a tensor of shape [2]",
    "ms.hessian_attribution_of(lambda w: 2.0, torch.ones(2))": "ValueError: `function` must give a scalar tensor (no `.item()`), but gives float 2.0",
    "ms.collect_gradients(model, [], svd)": "ValueError: No tasks: the list is empty",
    "ms.collect_gradients(model, task, 3)": "TypeError: `over` must be a decomposition",
    "ms.order_by_effect(ms.rank_directions(model, task, svd), by='size')": (
        "ValueError: `by` is 'size', but must be 'effect', 'kl_divergence'"
    ),
    # orders and learned subspaces
    "ms.collect_reads(model, task, draws=0)": "ValueError: `draws` is 0, but must be",
    "ms.collect_reads(model, 'I believe')": "TypeError: A task is needed, but this is str 'I believe'",
    "ms.order_by_elimination(model, task, [svd, svd])": "TypeError: `svd` must be one Decomposition here, but is 2",
    "ms.order_by_elimination(model, task, svd, share='half')": "ValueError: `share` is 'half', but must be from 0 to below 1",
    "ms.balanced_directions(model, task, writes)": "TypeError: `svd` must be a Decomposition, but is Writes",
    "ms.balanced_directions(model, task, svd, side='both')": "ValueError: `side` is 'both', but must be 'write' or 'read'",
    "ms.balanced_directions(model, task, ms.decompose(writes, per='site')[:2])": "KeyError: No basis is of the site",
    "ms.read_write_angles(model, task, 0)": "ValueError: `rank` is 0, but must be",
    "ms.read_write_angles(model, task, 24)": "ValueError: `rank` is 24, but layer 0 attn has 23 directions that are written",
    "ms.learn_subspace(model, task, 129)": "ValueError: `rank` is 129, but must be a whole number from 1 to 128",
    "ms.learn_subspace(model, task, 3, start=task)": "TypeError: A basis must be a Subspace, a Decomposition or a tensor",
    "ms.learn_subspace(model, task, 3, per='head')": "ValueError: `per` is 'head', but must be 'pool' or 'site'",
    "ms.learn_subspace(model, task, 3, steps=1.5)": "ValueError: `steps` is 1.5, but must be a whole number",
    "ms.learn_subspace(model, task, 3, metric=ms.log_prob)": "TypeError: `learn_subspace` has no option `metric`",
    "ms.compare_orders(model, task, [3])": "ValueError: There is 1 text or group",
    "ms.compare_orders(model, [task, task], 3)": "TypeError: `ranks` must be a list of whole numbers, but is int",
    "ms.compare_orders(model, [task, task], [3], orders=['best'])": "ValueError: `orders` holds 'best', but must be of",
    "ms.gradient_basis(svd)": "TypeError: A Gradients is needed here, but this is Decomposition",
    "ms.gradient_basis([])": "ValueError: There are no gradients: the list is empty",
    "ms.sweep_ridge(model, task, svd, alphas=3)": "TypeError: `alphas` must be a list of numbers, but is 3",
    "ms.sweep_ridge(model, task, svd, alphas=['a'])": "TypeError: `alphas` must be a list of numbers",
    "ms.sweep_ridge(model, task, svd, alphas=[-1.0])": "ValueError: `alphas` must be finite numbers from 0, at least one",
    "ms.sweep_ridge(model, task, 'svd')": "TypeError: `svd` must be a Decomposition, but is str",
    "ms.figures.accumulated_scores({})": "ValueError: There are no attributions to compare",
    "ms.figures.hessian_spectrum(svd)": "TypeError: An Attribution is needed here, but this is Decomposition",
    "ms.figures.clip_and_ridge(svd, svd)": "TypeError: A RankSweep is needed here, but this is Decomposition",
}  # fmt: skip


@pytest.mark.fault(6, 11, 13, 17, 18, 19)
def test_every_row_is_met_by_its_own_sentence():
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_doors"], capture_output=True, text=True, check=True
    )
    met = json.loads(run.stdout.splitlines()[-1])
    assert set(met) == set(ROWS)
    wrong = {row: met[row] for row, said in ROWS.items() if not str(met[row]).startswith(str(said))}
    assert not wrong, json.dumps(wrong, indent=1, ensure_ascii=False)


def _meet(row: str, names: dict) -> object:
    try:
        return eval(row, names)
    except Exception as error:
        return f"{type(error).__name__}: {error.args[0]}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    model = ms.load_model(device="cpu")
    task = ms.Task.from_text(model, "I believe", max_new_tokens=20)
    writes = ms.collect_writes(model, task)
    names = {
        "ms": ms,
        "np": np,
        "statistics": statistics,
        "torch": torch,
        "Gate": Gate,
        "model": model,
        "task": task,
        "writes": writes,
        "svd": ms.decompose(writes),
    }
    print(
        json.dumps(
            {
                row: result if isinstance(result := _meet(row, names), int) else str(result)
                for row in ROWS
            }
        )
    )
