//! Keys, as digests. A key is hashed the moment it comes in, and looked up by its digest: whoever times the look-up
//! learns something of a SHA-256 sum, from which no key can be told.

use std::fmt;

use sha2::{Digest, Sha256};

/// The SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// Of a key.
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// 64 hex digits.
    pub fn to_hex(self) -> String {
        hex(&self.0)
    }

    /// Whether two are equal, in a time that does not tell where they differ.
    pub fn equals(&self, other: &Self) -> bool {
        let differ = self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b));
        std::hint::black_box(differ) == 0
    }

    /// From 64 hex digits.
    pub fn from_hex(hex: &str) -> Option<Self> {
        let hex = hex.as_bytes();
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let mut digest = [0; 32];
        for (at, byte) in digest.iter_mut().enumerate() {
            *byte = digit(*hex.get(2 * at)?)? << 4 | digit(*hex.get(2 * at + 1)?)?;
        }
        (hex.len() == 64).then_some(Self(digest))
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDigest(..)")
    }
}

/// Why a request has no tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// No credential came along.
    #[error("no API key: send it in the header `Authorization: Bearer KEY`")]
    Missing,
    /// The credential is none of ours.
    #[error("the API key is not valid")]
    Invalid,
    /// It was valid once.
    #[error("the API key has expired")]
    Expired,
    /// It is valid elsewhere (403, PERMISSION_DENIED).
    #[error("the API key is not valid from this address")]
    Address,
}

/// A key that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("API key {index} is empty or holds a space or a control character; no client could send it")]
pub struct KeyError {
    /// Its place in the list.
    pub index: usize,
}

/// The keys of `--api-key`.
#[derive(Clone, Default)]
pub struct Keys {
    pub(crate) digests: Vec<KeyDigest>,
}

impl Keys {
    /// None at all: everybody may come in, unless a file has tenants.
    ///
    /// # Errors
    /// A key that cannot be sent in a header.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Result<Self, KeyError> {
        let digest = |(index, key): (usize, K)| {
            let key = key.as_ref();
            let sendable = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
            if sendable { Ok(KeyDigest::of(key)) } else { Err(KeyError { index }) }
        };
        Ok(Self { digests: keys.into_iter().enumerate().map(digest).collect::<Result<_, _>>()? })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.digests.len())
    }
}

/// The token in an `Authorization` header: `Bearer TOKEN`, the scheme in any case (RFC 6750, RFC 9110 section 11.1).
pub fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_sha256sum() {
        // printf %s abc | sha256sum
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(KeyDigest::from_hex(hex), Some(KeyDigest::of("abc")));
        assert_eq!(KeyDigest::from_hex(&hex.to_uppercase()), Some(KeyDigest::of("abc")));
        assert_eq!(KeyDigest::of("abc").to_hex(), hex);
        assert!(
            KeyDigest::of("abc").equals(&KeyDigest::of("abc"))
                && !KeyDigest::of("abc").equals(&KeyDigest::of("abd"))
        );
        for bad in ["", &hex[1..], &format!("{hex}0"), &hex.replace('b', "g"), "é".repeat(32).as_str()] {
            assert_eq!(KeyDigest::from_hex(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_that_no_header_can_carry_are_refused() {
        for bad in ["", "a b", "a\n", "ключ"] {
            assert_eq!(Keys::new(["ok", bad]).unwrap_err(), KeyError { index: 1 }, "{bad:?}");
        }
    }

    #[test]
    fn bearer_tokens_are_found_and_others_are_not() {
        assert_eq!(bearer("Bearer k"), Some("k"));
        assert_eq!(bearer("bEARER   k "), Some("k"));
        for not in ["k", "Basic k", "Bearer", "Bearerk", ""] {
            assert_eq!(bearer(not), None, "{not:?}");
        }
    }

    #[test]
    fn debug_output_holds_no_secret() {
        assert_eq!(format!("{:?}", Keys::new(["secret"]).unwrap()), "Keys(1)");
        assert_eq!(format!("{:?}", KeyDigest::of("secret")), "KeyDigest(..)");
    }
}
