"""Policy gradients without logits: PPO's and GRPO's clip, GSPO, DPO, ORPO, and a toy that learns.

The toy's tokens are drawn from its 16 likeliest, and these are replayed: log-probabilities over all
would be of another policy. The KL to where it began is exact. Offline, some seconds on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import losses


def clipped(log_ratio, advantages, low=0.2, high=0.28):  # PPO, GRPO, DAPO
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)


def gspo(log_ratio, advantages, mask):  # one ratio for all tokens of a completion
    mean = (log_ratio * mask).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    return clipped(jax.lax.stop_gradient(mean - log_ratio) + log_ratio, advantages)


def dpo(chosen, rejected, chosen_ref, rejected_ref, beta=0.1):  # sums over completions
    return -jax.nn.log_sigmoid(beta * (chosen - chosen_ref - rejected + rejected_ref))


def orpo(chosen, rejected, weight=0.1):  # means over completions
    log_odds = [x - jnp.log1p(-jnp.exp(x)) for x in (chosen, rejected)]
    return -chosen - weight * jax.nn.log_sigmoid(log_odds[0] - log_odds[1])


@jax.jit
def step(head, first, prompts, key):
    states = jnp.tanh(first["trunk"][prompts])  # [prompts, group, H], by a trunk that stays
    likeliest, ids = jax.lax.top_k(states @ head, 16)  # the sampler's part
    tokens = jnp.take_along_axis(ids, jax.random.categorical(key, likeliest)[..., None], -1)[..., 0]
    rewards = jnp.float32(tokens % 8 == prompts)  # yours
    advantages = rewards - rewards.mean(-1, keepdims=True)  # of a group

    def loss(head):
        now = losses.linear_log_probs(states, head, tokens, support=ids, entropy=True)
        kl = losses.linear_kl_divergence(states, head, states, first["head"], direction="reverse")
        return (clipped(now.values - old, advantages) + 1e-3 * (kl - now.entropy)).mean()

    old = losses.linear_log_probs(states, head, tokens, support=ids).values
    for _ in range(2):
        head = head - 20.0 * jax.grad(loss)(head)
    return head, rewards.mean()


rng, shapes = np.random.default_rng(0), {"trunk": (8, 64), "head": (64, 512)}
first = {name: jnp.array(0.3 * rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
head, rewards, prompts = first["head"], [], np.arange(8)[:, None].repeat(32, 1)
for number in range(100):
    head, reward = step(head, first, prompts, jax.random.key(number))
    rewards.append(float(reward))
assert rewards[0] < 0.3 < 0.8 < np.mean(rewards[-5:])
print(f"worked: from {rewards[0]:.0%} to {np.mean(rewards[-5:]):.0%} of the tokens as asked")
