//! Block addresses of each conversation's last turn, so that its next one hashes only what is new.
//!
//! Bounded in tokens; the turn that was used longest ago goes first. What is kept here saves work and changes nothing:
//! tokens are compared, so a session's name may be wrong, shared or guessed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;
use quire_core::{BlockHash, BlockHasher, CacheSalt, TokenId};

/// Tokens of all turns together: 16 MiB, and a quarter of it for their addresses where blocks hold 16 tokens.
const MAX_TOKENS: usize = 4 << 20;
/// A shorter prompt is hashed sooner than it is looked up.
const MIN_TOKENS: usize = 512;

/// The last turns of conversations.
#[derive(Default)]
pub(crate) struct Sessions {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    turns: HashMap<(CacheSalt, u64), Turn>,
    /// By when they were last used.
    order: BTreeMap<u64, (CacheSalt, u64)>,
    clock: u64,
    num_tokens: usize,
}

struct Turn {
    used: u64,
    prompt: Arc<[TokenId]>,
    chain: Arc<[BlockHash]>,
}

impl Inner {
    fn take(&mut self, key: (CacheSalt, u64)) -> Option<Turn> {
        let turn = self.turns.remove(&key)?;
        self.order.remove(&turn.used);
        self.num_tokens -= turn.prompt.len();
        Some(turn)
    }

    fn put(&mut self, key: (CacheSalt, u64), prompt: &Arc<[TokenId]>, chain: &Arc<[BlockHash]>) {
        self.take(key);
        self.clock += 1;
        let turn = Turn { used: self.clock, prompt: Arc::clone(prompt), chain: Arc::clone(chain) };
        self.order.insert(self.clock, key);
        self.turns.insert(key, turn);
        self.num_tokens += prompt.len();
        while self.num_tokens > MAX_TOKENS
            && let Some((_, &oldest)) = self.order.first_key_value()
        {
            self.take(oldest);
        }
    }
}

impl Sessions {
    /// The chain of `prompt` under `salt`, from what is known of the session's last turn.
    pub(crate) fn chain(
        &self,
        hasher: &BlockHasher,
        salt: CacheSalt,
        session: Option<u64>,
        prompt: &Arc<[TokenId]>,
    ) -> Arc<[BlockHash]> {
        let Some(session) = session.filter(|_| (MIN_TOKENS..=MAX_TOKENS).contains(&prompt.len())) else {
            return hasher.chain(salt, prompt).into();
        };
        let key = (salt, session);
        let last = self.inner.lock().take(key);
        let chain: Arc<[BlockHash]> = match last {
            Some(last) => chain_after(hasher, salt, &last.prompt, &last.chain, prompt).into(),
            None => hasher.chain(salt, prompt).into(),
        };
        self.inner.lock().put(key, prompt, &chain);
        chain
    }
}

/// [`BlockHasher::chain`] of `tokens` when `known` is the chain, under the same salt, of `before`: blocks with the same
/// tokens up to their end are not hashed again.
pub fn chain_after(
    hasher: &BlockHasher,
    salt: CacheSalt,
    before: &[TokenId],
    known: &[BlockHash],
    tokens: &[TokenId],
) -> Vec<BlockHash> {
    let block_size = hasher.block_size() as usize;
    let mut chain = Vec::with_capacity(tokens.len() / block_size);
    let blocks = |tokens| <[TokenId]>::chunks_exact(tokens, block_size);
    let same = known.iter().zip(blocks(before).zip(blocks(tokens)));
    chain.extend(same.take_while(|(_, (before, now))| before == now).map(|(hash, _)| *hash));
    let mut parent = chain.last().copied().unwrap_or_else(|| hasher.root(salt));
    chain.extend(blocks(&tokens[chain.len() * block_size..]).map(|block| {
        parent = hasher.next(parent, block);
        parent
    }));
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_a_chain_changes_nothing_but_the_work() {
        let hasher = BlockHasher::new((1, 2), 4);
        let salt = hasher.salt(b"a");
        let before: Vec<TokenId> = (0..18).collect();
        let known = hasher.chain(salt, &before);
        for differs_at in 0..24 {
            for len in 0..24 {
                let mut tokens: Vec<TokenId> = (0..len).collect();
                tokens.iter_mut().skip(differs_at).for_each(|token| *token += 100);
                let expected = hasher.chain(salt, &tokens);
                assert_eq!(chain_after(&hasher, salt, &before, &known, &tokens), expected);
                assert_eq!(chain_after(&hasher, salt, &before, &known[..2], &tokens), expected);
            }
        }
    }

    #[test]
    fn chains_are_those_of_the_hasher_and_memory_is_bounded() {
        let hasher = BlockHasher::new((1, 2), 16);
        let sessions = Sessions::default();
        let [a, b] = [b"a", b"b"].map(|name| hasher.salt(name));
        let turn = |first: u32, len: u32| -> Arc<[TokenId]> { (first..first + len).collect() };
        for (salt, session, prompt) in [
            (a, Some(1), turn(0, 1000)),
            (a, Some(1), turn(0, 3000)),
            (a, Some(1), turn(5, 3000)),
            (a, Some(1), turn(5, 600)),
            (b, Some(1), turn(5, 3000)),
            (a, None, turn(5, 3000)),
            (a, Some(2), turn(5, 100)),
        ] {
            let chain = sessions.chain(&hasher, salt, session, &prompt);
            assert_eq!(chain[..], hasher.chain(salt, &prompt)[..]);
        }
        assert_eq!(sessions.inner.lock().turns.len(), 2, "one turn a session, none of short prompts");
        let long = turn(0, 1 << 20);
        for session in 10..20 {
            sessions.chain(&hasher, a, Some(session), &long);
            let inner = sessions.inner.lock();
            assert_eq!(inner.num_tokens, inner.turns.values().map(|turn| turn.prompt.len()).sum::<usize>());
            assert!(inner.num_tokens <= MAX_TOKENS && inner.order.len() == inner.turns.len());
        }
        let inner = sessions.inner.lock();
        assert!(inner.turns.contains_key(&(a, 19)) && !inner.turns.contains_key(&(a, 15)), "the oldest goes");
    }
}
