//! Content addresses of full KV blocks: a keyed hash chain over token ids.
//!
//! `hash(block i) = SipHash-2-4-128(key, hash(block i-1) || tokens of block i)`, where the parent of block 0 is derived
//! from the salt. SipHash with a secret key is a pseudo-random function (Aumasson & Bernstein, 2012), so a client who
//! does not know the key cannot construct a collision, and equal prefixes under different salts share nothing.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher24};

use crate::TokenId;

/// Address of one full block with everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockHash(pub u128);

/// Namespace of a prefix cache: requests share blocks only when their salts are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct CacheSalt(pub u128);

/// Computes chains. Copy it freely; all copies of one process share the key.
#[derive(Clone, Copy, Debug)]
pub struct BlockHasher {
    key: (u64, u64),
    block_size: u32,
}

impl BlockHasher {
    /// `key` should be random per process unless replicas must agree on addresses. `block_size` is in tokens.
    pub const fn new(key: (u64, u64), block_size: u32) -> Self {
        Self { key, block_size }
    }

    /// Tokens in a block.
    pub const fn block_size(&self) -> u32 {
        self.block_size
    }

    /// A salt derived from any bytes that name a namespace (a tenant, a client's own salt).
    pub fn salt(&self, namespace: &[u8]) -> CacheSalt {
        let mut hasher = self.hasher();
        hasher.write(b"salt");
        hasher.write(namespace);
        CacheSalt(hasher.finish128().as_u128())
    }

    /// The parent of the first block.
    pub fn root(&self, salt: CacheSalt) -> BlockHash {
        BlockHash(salt.0)
    }

    /// Address of the block that holds `tokens` (exactly `block_size` of them) after `parent`.
    pub fn next(&self, parent: BlockHash, tokens: &[TokenId]) -> BlockHash {
        debug_assert_eq!(tokens.len(), self.block_size as usize);
        let mut hasher = self.hasher();
        hasher.write(&parent.0.to_le_bytes());
        // The hasher is several times faster on whole words.
        let mut bytes = [0; 64];
        for part in tokens.chunks(16) {
            for (to, token) in bytes.chunks_exact_mut(4).zip(part) {
                to.copy_from_slice(&token.to_le_bytes());
            }
            hasher.write(&bytes[..4 * part.len()]);
        }
        BlockHash(hasher.finish128().as_u128())
    }

    /// Addresses of all full blocks of `tokens`, in order.
    pub fn chain(&self, salt: CacheSalt, tokens: &[TokenId]) -> Vec<BlockHash> {
        let mut parent = self.root(salt);
        tokens
            .chunks_exact(self.block_size as usize)
            .map(|block| {
                parent = self.next(parent, block);
                parent
            })
            .collect()
    }

    fn hasher(&self) -> SipHasher24 {
        SipHasher24::new_with_keys(self.key.0, self.key.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_depends_on_everything_before() {
        let hasher = BlockHasher::new((1, 2), 2);
        let salt = hasher.salt(b"a");
        let chain = hasher.chain(salt, &[1, 2, 3, 4, 5]);
        assert_eq!(chain.len(), 2, "the partial block has no address");
        assert_eq!(chain[..1], hasher.chain(salt, &[1, 2, 9, 9])[..1]);
        assert_ne!(chain[1], hasher.chain(salt, &[7, 2, 3, 4])[1], "same tokens, other parent");
        assert_ne!(chain[0], hasher.chain(hasher.salt(b"b"), &[1, 2])[0], "other salt");
        assert_ne!(chain[0], BlockHasher::new((1, 3), 2).chain(salt, &[1, 2])[0], "other key");
    }
}
