//! Where a tenant's requests may come from.

use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Addresses that begin alike: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// As IPv6, so that both kinds compare alike; IPv4 is mapped.
    bits: u128,
    mask: u128,
}

impl Network {
    /// Whether an address is in it. An IPv4 address is the same when it comes mapped into IPv6.
    pub fn contains(&self, address: IpAddr) -> bool {
        bits(address) & self.mask == self.bits
    }
}

/// `::ffff:a.b.c.d` for IPv4 (RFC 4291, section 2.5.5.2).
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => Ipv6Addr::to_bits(v6),
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("must be an IP address or a network such as 10.0.0.0/8, got {text:?}");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix: u32 = match prefix {
            None => width,
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse().ok().filter(|&prefix| prefix <= width).ok_or_else(wrong)?
            }
            Some(_) => return Err(wrong()),
        };
        let mask = u128::MAX.checked_shl(width - prefix).unwrap_or(0);
        let network = Self { bits: bits(address), mask };
        if network.bits & mask != network.bits {
            return Err(format!("{text:?} has bits behind its prefix; write the network's first address"));
        }
        Ok(network)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_hold_what_begins_alike() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", &["10.0.0.1", "10.255.255.255", "::ffff:10.1.2.3"][..], &["11.0.0.0", "::1"][..]),
            ("192.168.1.7", &["192.168.1.7"], &["192.168.1.6", "192.168.1.8"]),
            ("192.168.1.4/31", &["192.168.1.4", "192.168.1.5"], &["192.168.1.6"]),
            ("0.0.0.0/0", &["1.2.3.4", "255.0.0.1"], &["::1", "2001:db8::1"]),
            ("2001:db8::/32", &["2001:db8::1", "2001:db8:ffff::"], &["2001:db9::", "1.2.3.4"]),
            ("::/0", &["::1", "1.2.3.4"], &[]),
            ("::1", &["::1"], &["::2", "127.0.0.1"]),
        ] {
            let parsed: Network = network.parse().unwrap();
            inside.iter().for_each(|ip| assert!(parsed.contains(ip.parse().unwrap()), "{network} {ip}"));
            outside.iter().for_each(|ip| assert!(!parsed.contains(ip.parse().unwrap()), "{network} {ip}"));
        }
        for bad in [
            "",
            "10",
            "10.0.0.0/33",
            "::/129",
            "10.0.0.1/8",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "a.b",
            "10.0.0.0/8/8",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
