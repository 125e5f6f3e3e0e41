"""Multi-token prediction: the definition by hand, the peer's blocks, the ends of documents, in and out of folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.models.stats import active_params, forward_flops_per_token, total_params
from llmjax.models.transformer import hidden_states, mtp_hidden_states, transformer_spec
from llmjax.objectives.lm import lm_loss

MODELS = {name: dataclasses.replace(cfg, num_mtp_layers=2) for name, cfg in tiny.MODELS.items()}


def without(cfg):
    return dataclasses.replace(cfg, num_mtp_layers=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_main_model_is_untouched(name):
    cfg, text = MODELS[name], tiny.tokens(MODELS[name], 2, 10)
    params = tiny.language_model(cfg)
    alone = params.replace(mtp=None)
    np.testing.assert_array_equal(tiny.logits(params, text, cfg), tiny.logits(alone, text, without(cfg)))


def test_loss_is_the_mean_over_modules_within_documents():
    """Each module's negative log-likelihood, token by token, of the token that lies one further in the same document."""
    cfg, batch = MODELS["dense"], tiny.lm_batch(MODELS["dense"], 3, 14)
    params = tiny.language_model(cfg)
    inputs = dict(positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"])
    hidden, _, _ = hidden_states(params, batch["inputs"], cfg, **inputs)
    losses, known = [], batch["targets"]
    for module in range(2):
        hidden, _ = mtp_hidden_states(params, module, hidden, known, cfg, **inputs)
        log_probs = jax.nn.log_softmax(hidden @ params.head.T)
        nats, tokens = 0.0, 0
        for row in range(3):
            segments = batch["segment_ids"][row]
            for t in range(14 - module - 1):
                if segments[t] == segments[t + module + 1] and batch["loss_mask"][row, t + module + 1]:
                    nats, tokens = nats - log_probs[row, t, batch["targets"][row, t + module + 1]], tokens + 1
        losses.append(nats / tokens)
        known = np.roll(known, -1, axis=1)
    loss, metrics = jax.jit(lm_loss, static_argnums=3)(params, batch, None, cfg)
    np.testing.assert_allclose(metrics["mtp_loss"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["loss"] + 0.3 * metrics["mtp_loss"], rtol=1e-6)


def test_no_module_sees_what_it_predicts():
    cfg = MODELS["dense"]
    params, batch = tiny.language_model(cfg), tiny.lm_batch(cfg, 1, 12)
    inputs = dict(positions_BT=batch["positions"], segment_ids_BT=np.ones((1, 12), np.int32))

    def second(targets):
        hidden, _, _ = hidden_states(params, batch["inputs"], cfg, **inputs)
        hidden, _ = mtp_hidden_states(params, 0, hidden, targets, cfg, **inputs)
        return np.asarray(hidden)

    changed = batch["targets"].copy()
    changed[0, 6] = (changed[0, 6] + 1) % cfg.vocab_size
    differs = np.any(second(batch["targets"]) != second(changed), axis=-1)[0]
    assert not differs[:6].any() and differs[6:].all()


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], MODELS))
def test_it_is_trained_and_counted(name):
    cfg, batch = MODELS[name], tiny.lm_batch(MODELS[name], 2, 12)
    loss_and_grads = jax.jit(jax.value_and_grad(lm_loss, has_aux=True), static_argnums=3)
    (_, metrics), grads = loss_and_grads(tiny.language_model(cfg), batch, None, cfg)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads.mtp))
    assert name != "moe" or metrics["moe/load"].shape == (4, 4)  # the routers of two layers and two modules
    block = (total_params(dataclasses.replace(cfg, num_layers=4)) - total_params(dataclasses.replace(cfg, num_layers=2))) // 2
    assert total_params(cfg) - total_params(without(cfg)) == 2 * (block + 2 * 16 * 16 + 3 * 16)
    more = forward_flops_per_token(cfg, 8) - forward_flops_per_token(without(cfg), 8)
    layer = forward_flops_per_token(dataclasses.replace(cfg, num_layers=3), 8) - forward_flops_per_token(cfg, 8)
    assert more == 2 * (layer + 2 * (2 * 16 * 16 + cfg.vocab_size * 16))
    assert active_params(cfg) > active_params(without(cfg))


@pytest.mark.parity
def test_against_the_peers_blocks_and_through_a_folder(tmp_path):
    """Published folders hold the module as one more layer; here it is a layer of a DeepSeek-V3 of transformers."""
    peers = pytest.importorskip("peers")
    torch = peers.torch
    peer = peers.save("deepseek_v3", str(tmp_path / "long"))
    tensors = load_file(tmp_path / "long" / "model.safetensors")
    rng, last, d = np.random.default_rng(0), "model.layers.3.", 32
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{last}{norm}.weight"] = rng.normal(1, 0.2, d).astype(np.float32)
    tensors[f"{last}eh_proj.weight"] = rng.normal(0, 0.2, (d, 2 * d)).astype(np.float32)
    tensors[f"{last}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{last}shared_head.head.weight"] = tensors["lm_head.weight"]
    folder = tmp_path / "mtp"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((tmp_path / "long" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    cfg, raw = read_config(str(folder))
    assert cfg.num_mtp_layers == 1 and cfg.num_layers == 3
    params = load_params(str(folder), cfg, "deepseek_v3")

    text = tiny.tokens(cfg, 2, 13)
    inputs, known = text[:, :-1], text[:, 1:]
    places = np.broadcast_to(np.arange(12, dtype=np.int32), inputs.shape)

    @jax.jit
    def predict(params):
        hidden, _, _ = hidden_states(params, inputs, cfg)
        rows = dict(positions_BT=places, segment_ids_BT=np.ones_like(inputs))
        hidden, _ = mtp_hidden_states(params, 0, hidden, known, cfg, **rows)
        return jnp.einsum("btd,vd->btv", hidden, params.head)

    ours = np.asarray(predict(params))

    def norm(x, name):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps)
        return x * torch.from_numpy(tensors[f"{last}{name}.weight"])

    with torch.no_grad():
        layer, peer.model.layers = peer.model.layers[3], peer.model.layers[:3]
        peer.config.num_hidden_layers = 3
        x = peer.model(input_ids=torch.from_numpy(inputs).long()).last_hidden_state
        embedded = peer.model.embed_tokens(torch.from_numpy(known).long())
        both = torch.cat([norm(embedded, "enorm"), norm(x, "hnorm")], dim=-1)
        x = both @ torch.from_numpy(tensors[f"{last}eh_proj.weight"]).T
        rope = peer.model.rotary_emb(x, torch.arange(12)[None])
        mask = torch.full((12, 12), -1e30).triu(1)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=rope)
        x = x[0] if isinstance(x, tuple) else x
        theirs = peer.lm_head(norm(x, "shared_head.norm")).numpy()
    assert np.std(theirs) > 0.2 and np.max(np.abs(ours - theirs)) <= 2e-4

    save_params(params, cfg, "deepseek_v3", str(tmp_path / "out"), source=raw)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parity
def test_a_folder_that_names_modules_which_it_does_not_hold(tmp_path):
    peers = pytest.importorskip("peers")
    peers.save("deepseek_v3", str(tmp_path / "hf"))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    cfg, raw = read_config(str(tmp_path / "hf"))
    assert cfg.num_mtp_layers == 0 and load_params(str(tmp_path / "hf"), cfg, "deepseek_v3").mtp is None
    assert raw["num_nextn_predict_layers"] == 0
    assert jax.tree.structure(transformer_spec(cfg).mtp) == jax.tree.structure(None)
