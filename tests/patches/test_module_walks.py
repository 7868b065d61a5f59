"""Walks over modules: the same modules, names and order as torch's, whatever the tree and whatever it overrides."""

from __future__ import annotations

import copy
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from hf_turbo.patches import engine, module_walks
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_turbo
from tests.models import batch, switched_off, tiny_model

pytestmark = pytest.mark.newest

STOCK = {name: vars(nn.Module)[name] for name in ("named_modules", "parameters", "train")}


@pytest.fixture
def walks():
    """Patched walks; `stock()` gives what torch does on the same tree."""
    engine.switch(True)
    patches = module_walks.find().patches
    for patch in patches:
        patch.apply()
    yield
    for patch in reversed(patches):
        assert patch.revert()
    engine.switch(False)
    assert {name: vars(nn.Module)[name] for name in STOCK} == STOCK


def stock(function, *args, **kwargs):
    """The result with the switch off: torch's own walks."""
    engine.switch(False)
    try:
        return function(*args, **kwargs)
    finally:
        engine.switch(True)


class Proxy(nn.Module):
    """Names its modules itself, as PEFT's MultiheadAttention does more or less."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.asked = inner, []

    def named_modules(self, *args, **kwargs):
        self.asked.append((args[1:], kwargs))
        for name, module in super().named_modules(*args, **kwargs):
            yield f"<{name}>", module


class Recorder(nn.Module):
    """Has a `train` of its own, and children."""

    def __init__(self, *children):
        super().__init__()
        self.calls, self.inner = [], nn.ModuleList(children)

    def train(self, mode=True):
        self.calls.append((mode, self.training, [child.training for child in self.inner]))
        return super().train(mode)


class Setter(nn.Module):
    """Sees each attribute that is set."""

    def __init__(self):
        super().__init__()
        self.inner, self.sets = nn.Linear(1, 1), 0

    def __setattr__(self, name, value):
        if name == "training" and "sets" in self.__dict__:
            self.__dict__["sets"] += 1
        super().__setattr__(name, value)


class OfState(nn.Module):
    """`training` is a property."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 1)

    @property
    def training(self):
        return self.__dict__.get("mode", True)

    @training.setter
    def training(self, mode):
        self.__dict__["sets"] = self.__dict__.get("sets", 0) + 1
        self.__dict__["mode"] = mode


class Childless(nn.Module):
    """Hides a child from `children()`, and so from `train()`."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 1)

    def children(self):
        return iter(())


def peft_model():
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    return get_peft_model(tiny_model("llama"), config)


def shared():
    a, b = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    b[0].weight = a.weight
    tree = nn.ModuleDict({"x": b, "y": nn.ModuleList([a, b, a]), "z": nn.Embedding(2, 2), "again": b})
    tree["z"].weight = a.weight
    tree.register_module("none", None)
    tree.y.register_module("none", None)
    tree.y.register_parameter("nothing", None)
    return tree


def overrides():
    proxy = Proxy(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)))
    inner = Proxy(nn.Linear(1, 1))
    instance = nn.Sequential(nn.Linear(1, 1))
    instance.named_modules = types.MethodType(lambda self, *args: iter([("own", self)]), instance)
    return nn.Sequential(nn.Sequential(proxy, nn.Linear(1, 1)), proxy, nn.ModuleList([instance, inner, inner.inner]))


def nameless():
    """No API gives a child an empty name, but `_modules` takes it."""
    tree = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    tree._modules[""] = nn.Sequential(nn.Linear(1, 1))
    tree[0]._modules[""] = nn.Sequential(nn.Linear(1, 1))
    return tree


def scripted():
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.Dropout())), nn.Linear(1, 1))


def deep():
    tree = nn.Linear(1, 1)
    for _ in range(100):
        tree = nn.Sequential(nn.ReLU(), tree)
    return tree


TREES = [peft_model, shared, overrides, nameless, scripted, deep, lambda: nn.Embedding(3, 2), nn.Module]


@pytest.mark.parametrize("make", TREES)
@pytest.mark.parametrize("remove_duplicate", [True, False])
@pytest.mark.parametrize("prefix", ["", "root"])
def test_the_same_modules_and_parameters_in_the_same_order(walks, make, remove_duplicate, prefix):
    tree = make()

    def listed():
        memo = {next(tree.children(), None)}
        lists = [
            list(tree.named_modules(prefix=prefix, remove_duplicate=remove_duplicate)),
            list(tree.named_modules(memo, prefix, remove_duplicate)),
            list(tree.named_modules({tree}, prefix, remove_duplicate)),
            list(tree.modules()),
            list(tree.named_parameters(prefix=prefix, remove_duplicate=remove_duplicate)),
            list(tree.parameters()),
            list(tree.parameters(recurse=False)),
            list(tree.named_buffers(prefix=prefix, remove_duplicate=remove_duplicate)),
        ]
        return [[(x[0], id(x[1])) if isinstance(x, tuple) else id(x) for x in items] for items in lists], memo

    assert listed() == stock(listed)
    proxies = [module for module in tree.modules() if isinstance(module, Proxy)]
    for proxy in proxies:
        proxy.asked.clear()
        list(tree.parameters())
        asked = proxy.asked[:]
        proxy.asked.clear()
        stock(lambda: list(tree.parameters()))
        assert asked == proxy.asked


def test_results_are_generators(walks):
    """clip_grad_norm_ warns of an exhausted generator, and of that alone."""
    for result in (nn.Linear(1, 1).parameters(), nn.Linear(1, 1).named_modules()):
        assert isinstance(result, types.GeneratorType)
    generator = nn.Linear(1, 1).parameters()
    list(generator)
    with pytest.warns(UserWarning, match="empty generator"):
        torch.nn.utils.clip_grad_norm_(generator, 1.0)


def edited(change, method, at):
    """Names seen while `change(tree)` is made at the step `at`, and the error that ends the walk."""
    tree = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1)))
    seen = []
    try:
        for step, item in enumerate(getattr(tree, method)()):
            seen.append(item[0] if isinstance(item, tuple) else tuple(item.shape))
            if step == at:
                change(tree)
    except RuntimeError as error:
        seen.append(str(error))
    return seen


@pytest.mark.parametrize("method", ["named_modules", "parameters", "named_parameters"])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.add_module("new", nn.Linear(2, 2)),
        lambda tree: tree[0].add_module("new", nn.Linear(2, 2)),
        lambda tree: tree[1].add_module("new", nn.Linear(2, 2)),
        lambda tree: tree[1][0].add_module("new", nn.Linear(2, 2)),
        lambda tree: tree[0][1].register_parameter("new", nn.Parameter(torch.ones(3))),
        lambda tree: setattr(tree, "1", nn.Linear(2, 2)),
        lambda tree: delattr(tree, "1"),
    ],
)
def test_a_walk_sees_what_its_reader_changes(walks, change, method, at):
    assert edited(change, method, at) == stock(edited, change, method, at)


def test_a_cycle_ends_as_in_torch(walks):
    tree = nn.Sequential(nn.Linear(1, 1))
    tree[0].parent = tree
    for walk in (lambda: tree.named_modules(), lambda: tree.parameters()):
        assert len(list(walk())) == len(stock(lambda walk=walk: list(walk())))
    for endless in (lambda: list(tree.named_modules(remove_duplicate=False)), tree.train):
        with pytest.raises(RecursionError):
            endless()
        with pytest.raises(RecursionError):
            stock(endless)


def test_a_module_without_init_fails_as_in_torch(walks):
    class Bare(nn.Module):
        def __init__(self):
            pass

    for call in (lambda: list(Bare().named_modules()), lambda: list(Bare().parameters()), lambda: Bare().train()):
        with pytest.raises(AttributeError) as ours:
            call()
        with pytest.raises(AttributeError) as theirs:
            stock(call)
        assert str(ours.value) == str(theirs.value)


def training_tree():
    recorder, twice = Recorder(nn.Dropout(), Recorder(nn.ReLU())), Recorder(nn.ReLU())
    instance = nn.Sequential(nn.Dropout())
    instance.train = lambda mode=True: instance
    tree = nn.Sequential(
        nn.Sequential(nn.Dropout(), recorder, Setter(), OfState()),
        nn.ModuleList([twice, twice, Childless(), instance]),
        Proxy(nn.Dropout()),
        twice,
    )
    tree.register_module("none", None)
    tree[0][0].training = 0
    tree[0][1].inner[0].training = False
    tree[1][2].hidden.training = False
    return tree


def state_of(tree):
    kept = ("training", "calls", "sets", "mode")
    return [
        (name, [(key, module.__dict__[key]) for key in kept if key in module.__dict__])
        for name, module in tree.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("modes", [[True], [False], [True, True, False, False, True]])
def test_train_sets_and_calls_what_torch_does(walks, modes):
    ours, theirs = training_tree(), training_tree()
    for mode in modes:
        assert ours.train(mode) is ours
        stock(theirs.train, mode)
        found = state_of(ours)
        assert found == stock(state_of, theirs)
        assert all(type(value) is bool for _, kept in found for key, value in kept if key == "training")


@pytest.mark.parametrize("make", [peft_model, shared, scripted, deep])
def test_train_and_eval_of_other_trees(walks, make):
    tree = make()
    for mode in (True, False, False, True):
        assert (tree.train() if mode else tree.eval()) is tree
        assert {module.training for module in tree.modules()} == {mode}


@pytest.mark.parametrize("mode", [1, 0, None, "yes", torch.tensor(True)])
def test_train_takes_a_bool_alone(walks, mode):
    tree = nn.Sequential(nn.Dropout())
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        tree.train(mode)
    assert tree[0].training is True


def test_train_goes_on_from_what_an_override_changed(walks):
    class Grows(nn.Module):
        def train(self, mode=True):
            self.parent()._modules["last"] = nn.ReLU()
            return super().train(mode)

    def trained():
        tree = nn.Sequential()
        tree.add_module("grows", Grows())
        tree.add_module("last", nn.Dropout())
        tree.grows.parent = lambda: tree
        old = tree.last
        tree.train(False)
        return old.training, tree.last.training

    assert trained() == stock(trained) == (True, False)


@pytest.mark.parametrize("only_trainable", [True, False])
@pytest.mark.parametrize("exclude_embeddings", [True, False])
def test_num_parameters(walks, only_trainable, exclude_embeddings):
    plain, tied = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=True)
    head_first = copy.deepcopy(tied)
    head_first._modules = dict(reversed(head_first._modules.items()))
    adapted = peft_model()
    adapted.base_model.model.extra = shared()
    in_two = tiny_model("llama")
    in_two.model.again = in_two.model.embed_tokens
    odd = tiny_model("llama")
    odd.model.layers[0] = overrides()
    for model in (plain, tied, head_first, adapted, in_two, odd, plain.model):
        arguments = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
        assert model.num_parameters(**arguments) == stock(model.num_parameters, **arguments)


def test_num_parameters_of_4_bits(walks):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for storage in (torch.uint8, torch.bfloat16):
        model = tiny_model("llama")
        weight = model.model.layers[0].mlp.up_proj.weight.data
        packed = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_storage=storage)
        packed.data = torch.zeros(weight.numel() // 2 // storage.itemsize, 1, dtype=storage)
        model.model.layers[0].mlp.up_proj.weight = packed
        model.is_loaded_in_4bit = True
        expected = stock(model.num_parameters, exclude_embeddings=True)
        assert model.num_parameters(exclude_embeddings=True) == expected
        model.is_loaded_in_4bit = False
        assert model.num_parameters(exclude_embeddings=True) != expected


def test_zero_grad(walks):
    tree = shared()
    for to_none in (True, False):
        for parameter in tree.parameters():
            parameter.grad = torch.ones_like(parameter)
        tree.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) if to_none else not p.grad.any() for p in tree.parameters())


def test_replacements_look_like_the_stock_methods(walks):
    import inspect

    for name, method in STOCK.items():
        ours = vars(nn.Module)[name]
        assert ours is not method
        assert inspect.signature(ours) == inspect.signature(method)
        assert (ours.__qualname__, ours.__module__, ours.__doc__) == (
            method.__qualname__,
            method.__module__,
            method.__doc__,
        )


def counting_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def test_compiled_code_walks_as_before(walks):
    """fullgraph: a graph break raises. The graphs and their recompiles are those of torch's own bodies."""

    class Regularised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))

        def forward(self, x):
            y = self.layers(x).sum()
            for parameter in self.parameters():
                y = y + parameter.square().sum()
            for _, module in self.layers.named_modules():
                y = y + len(list(module.children()))
            return y + sum(p.sum() for p in self.layers.parameters())

    def compiled():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Regularised(), torch.ones(2, 3)
        graphs, backend = counting_graphs()
        function = torch.compile(model, fullgraph=True, backend=backend)
        outside = torch.compile(
            lambda x: sum(p.sum() for p in model.parameters()) * x.sum(), fullgraph=True, backend=backend
        )
        values = [function(x).item(), function(x).item(), outside(x).item()]
        return values, [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in graphs]

    assert compiled() == stock(compiled)


def test_compiled_models_keep_their_static_parameters(walks):
    """`named_parameters` stays torch's by identity: dynamo marks parameters static by it."""
    from torch._dynamo import output_graph

    assert nn.Module.named_parameters is output_graph.og_module_named_parameters_fn_ptr
    assert nn.Module.named_buffers is output_graph.og_module_named_buffers_fn_ptr


def test_train_inside_compiled_code(walks):
    def toggled():
        torch._dynamo.reset()
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))

        def step(x):
            model.eval()
            return model(x)

        first = torch.compile(step, backend="eager")(torch.ones(1, 2)).shape
        return first, model.training, model[0].training

    assert toggled() == stock(toggled)


def test_on_while_any_activation_wants_it():
    first, second = module_walks.find().patches, module_walks.find().patches
    for patch in (*first, *second):
        patch.apply()
    assert all(vars(nn.Module)[name] is not method for name, method in STOCK.items())
    assert all(patch.revert() for patch in first)
    assert all(vars(nn.Module)[name] is not method for name, method in STOCK.items())
    assert all(patch.revert() for patch in second)
    assert {name: vars(nn.Module)[name] for name in STOCK} == STOCK


def test_activations_overlap(tmp_path):
    """`enable()` while the training of a TurboCallback's trainer runs: the walks stay when that one ends."""

    class Enable(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert nn.Module.train is not STOCK["train"]
            hf_turbo.patch_model(tiny_model("qwen3"))

    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    callbacks = [hf_turbo.TurboCallback(report=False), Enable()]
    data = [{key: value[0] for key, value in batch(rows=1).items()}]
    Trainer(model=tiny_model("llama"), args=arguments, train_dataset=data, callbacks=callbacks).train()
    assert nn.Module.train is not STOCK["train"]
    hf_turbo.disable()
    assert {name: vars(nn.Module)[name] for name in STOCK} == STOCK


def test_doors_switch_it_on_and_off():
    hf_turbo.patch_model(tiny_model("llama"))
    row = hf_turbo.report().process[0]
    assert (row.role, row.found, row.patched, row.exactness) == ("host", 4, 4, "exact")
    captured = nn.Module.train
    assert captured is not STOCK["train"]
    hf_turbo.patch_model(tiny_model("qwen3"))
    assert sum(row.kernel == "one loop per walk" for row in hf_turbo.report().process) == 1
    hf_turbo.disable()
    assert {name: vars(nn.Module)[name] for name in STOCK} == STOCK
    tree = nn.Sequential(nn.Dropout())
    assert captured(tree, False) is tree
    assert tree[0].training is False
    assert hf_turbo.patch_model(tiny_model("llama"), host=False).process[0].reason == "switched off: host=False"
    assert nn.Module.train is STOCK["train"]


def test_a_foreign_patch_is_left_alone(monkeypatch):
    def train(self, mode=True):
        return STOCK["train"](self, mode)

    monkeypatch.setattr(nn.Module, "train", train)
    row = hf_turbo.patch_model(tiny_model("llama")).process[0]
    assert (row.patched, row.reason) == (3, "unknown Module.train")
    assert nn.Module.train is train
    hf_turbo.disable()
    hf_turbo.patch_model(nn.Linear(1, 1), host="auto")
    ours = nn.Module.named_modules

    def around(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", around)
    names = [name for name, _ in tiny_model("llama").named_modules()]
    hf_turbo.disable()
    assert nn.Module.named_modules is around
    assert any("named_modules" in note for note in hf_turbo.report().notes)
    assert [name for name, _ in tiny_model("llama").named_modules()] == names
    monkeypatch.setattr(nn.Module, "named_modules", ours)
    hf_turbo.patch_model(nn.Linear(1, 1))
    hf_turbo.disable()
    assert nn.Module.named_modules is STOCK["named_modules"]


class Collect(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        timed = ("runtime", "per_second")
        self.logs.append({key: value for key, value in logs.items() if not key.endswith(timed)})


@pytest.mark.parametrize("adapted", [False, True])
def test_a_training_logs_the_same(tmp_path, adapted):
    """Walks alone: every logged number, total_flos too, and every weight have the same bits."""

    def run(turbo):
        model = peft_model() if adapted else tiny_model("llama")
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            report_to="none", save_strategy="no", eval_strategy="steps", eval_steps=2, use_cpu=True, seed=0,
            include_num_input_tokens_seen="all", disable_tqdm=True,
        )  # fmt: skip
        collect = Collect()
        data = [{key: value[0] for key, value in batch(rows=1, seed=i).items()} for i in range(16)]
        runner = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[collect])
        if turbo:
            hf_turbo.enable(**switched_off("host"), host=True)
        runner.train()
        if turbo:
            assert hf_turbo.report().process[0].patched == 4
            hf_turbo.disable()
        return collect.logs, runner.state.total_flos, {name: p.detach().clone() for name, p in model.named_parameters()}

    logs, flos, weights = run(turbo=False)
    turbo_logs, turbo_flos, turbo_weights = run(turbo=True)
    assert logs == turbo_logs
    assert flos == turbo_flos > 0
    assert all(torch.equal(weight, turbo_weights[name]) for name, weight in weights.items())


def test_trainer_counts_once_per_step(walks, monkeypatch):
    """And anew in the next one, in another training, and for anyone else."""
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0), model=tiny_model("llama"))
    made, owners = [], module_walks._owners
    monkeypatch.setattr(module_walks, "_owners", lambda root: made.append(root) or owners(root))

    def operations() -> int:
        return module_walks.floating_point_ops(trainer, lambda self, inputs: self.model.num_parameters(), {})

    first = [operations() for _ in range(4)]
    assert len(made) == 1
    trainer.model.more = torch.nn.Linear(3, 5, bias=False)
    assert trainer.model.num_parameters() == first[0] + 15
    trainer.state.global_step = 1
    assert operations() == first[0] + 15
    assert len(made) == 3
    module_walks.COUNTS.forget()
    assert operations() == operations() == first[0] + 15
    assert len(made) == 4
    assert len(set(first)) == 1


def test_transformers_come_later(monkeypatch):
    monkeypatch.delitem(sys.modules, module_walks.MODELS)
    finding = module_walks.find()
    assert (finding.found, finding.patched) == (3, 3)
