//! Parses the text of a filter expression into a tree.

use std::net::IpAddr;

use super::{End, Net, Test};
use crate::config::MAX_FILTER;
use crate::wire::Mac;

/// Deepest nesting of parentheses and `not`.
const MAX_DEPTH: u32 = 64;

/// Why a text is not a filter expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// The text is too long.
    #[error("a filter may have at most {MAX_FILTER} bytes")]
    TooLong,
    /// The expression is nested too deeply.
    #[error("filter: more than {MAX_DEPTH} parentheses or `not` inside each other")]
    TooDeep,
    /// Something is missing at the end.
    #[error("filter: {expected} is missing at the end")]
    Ends {
        /// What should follow.
        expected: &'static str,
    },
    /// A word stands where another one should be.
    #[error("filter: {found:?} stands where {expected} should be")]
    Unexpected {
        /// The word that was found.
        found: String,
        /// What should stand there.
        expected: &'static str,
    },
}

/// A filter expression as a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    Test(Test),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
}

/// Parses an expression. Returns `None` if the text has no words.
pub(super) fn parse(text: &str) -> Result<Option<Expression>, FilterError> {
    if text.len() > MAX_FILTER {
        return Err(FilterError::TooLong);
    }
    let words = words(text);
    if words.is_empty() {
        return Ok(None);
    }
    let mut parser = Parser {
        words: &words,
        at: 0,
        depth: 0,
    };
    let expression = parser.or()?;
    match parser.peek() {
        None => Ok(Some(expression)),
        Some(_) => Err(parser.unexpected("`and`, `or` or the end")),
    }
}

fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for part in text.split_whitespace() {
        let mut rest = part;
        while let Some(at) = rest.find(['(', ')', '!']) {
            words.extend([&rest[..at], &rest[at..=at]]);
            rest = &rest[at + 1..];
        }
        words.push(rest);
    }
    words.retain(|word| !word.is_empty());
    words
}

struct Parser<'w> {
    words: &'w [&'w str],
    at: usize,
    depth: u32,
}

const A_TEST: &str =
    "a test (such as `host`, `net`, `port`, `ether host`, `ip`, `arp`, `tcp`, `vlan`)";

impl<'w> Parser<'w> {
    fn peek(&self) -> Option<&'w str> {
        self.words.get(self.at).copied()
    }

    fn next(&mut self, expected: &'static str) -> Result<&'w str, FilterError> {
        let word = self.peek().ok_or(FilterError::Ends { expected })?;
        self.at += 1;
        Ok(word)
    }

    fn take(&mut self, words: &[&str]) -> bool {
        let found = self.peek().is_some_and(|word| words.contains(&word));
        self.at += usize::from(found);
        found
    }

    /// Returns the error that the word just read, or the word to come, is not `expected`.
    fn unexpected(&self, expected: &'static str) -> FilterError {
        match self.peek() {
            Some(found) => FilterError::Unexpected {
                found: found.to_string(),
                expected,
            },
            None => FilterError::Ends { expected },
        }
    }

    fn or(&mut self) -> Result<Expression, FilterError> {
        let mut left = self.and()?;
        while self.take(&["or", "||"]) {
            left = Expression::Or(Box::new(left), Box::new(self.and()?));
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expression, FilterError> {
        let mut left = self.not()?;
        while self.take(&["and", "&&"]) {
            left = Expression::And(Box::new(left), Box::new(self.not()?));
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expression, FilterError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(FilterError::TooDeep);
        }
        let expression = if self.take(&["not", "!"]) {
            Expression::Not(Box::new(self.not()?))
        } else if self.take(&["("]) {
            let inner = self.or()?;
            if !self.take(&[")"]) {
                return Err(self.unexpected("`)`"));
            }
            inner
        } else {
            self.test()?
        };
        self.depth -= 1;
        Ok(expression)
    }

    fn test(&mut self) -> Result<Expression, FilterError> {
        let word = self.next(A_TEST)?;
        let test = match word {
            "ip" => Test::Ip,
            "ip6" => Test::Ip6,
            "arp" => Test::Arp,
            "icmp" => return Ok(both(Test::Ip, Test::Protocol(1))),
            "icmp6" => return Ok(both(Test::Ip6, Test::Protocol(58))),
            "tcp" => return self.transport(6),
            "udp" => return self.transport(17),
            "sctp" => return self.transport(132),
            "vlan" => Test::Vlan(self.vlan()?),
            "broadcast" => Test::Broadcast,
            "multicast" => Test::Multicast,
            "less" => Test::Less(self.number("a number of bytes")?),
            "greater" => Test::Greater(self.number("a number of bytes")?),
            "ether" => self.ether()?,
            "src" => self.of_end(End::Source)?,
            "dst" => self.of_end(End::Destination)?,
            _ => {
                self.at -= 1;
                return match word {
                    "host" | "net" | "port" | "portrange" => {
                        self.of_end(End::Either).map(Expression::Test)
                    }
                    _ => Err(self.unexpected(A_TEST)),
                };
            }
        };
        Ok(Expression::Test(test))
    }

    /// Parses what may follow `tcp`, as in `tcp port 80` or `tcp src port 80`.
    fn transport(&mut self, protocol: u8) -> Result<Expression, FilterError> {
        let protocol = Test::Protocol(protocol);
        let here = self.at;
        let end = match self.peek() {
            Some("src") => End::Source,
            Some("dst") => End::Destination,
            _ => End::Either,
        };
        self.at += usize::from(end != End::Either);
        if matches!(self.peek(), Some("port" | "portrange")) {
            return Ok(both(protocol, self.of_end(end)?));
        }
        self.at = here;
        Ok(Expression::Test(protocol))
    }

    fn vlan(&mut self) -> Result<Option<u16>, FilterError> {
        let is_number = |word: &str| word.bytes().all(|byte| byte.is_ascii_digit());
        match self.peek().filter(|word| is_number(word)) {
            None => Ok(None),
            Some(word) => match word.parse() {
                Ok(vlan @ 0..=4094) => {
                    self.at += 1;
                    Ok(Some(vlan))
                }
                _ => Err(self.unexpected("a VLAN from 0 to 4094")),
            },
        }
    }

    fn ether(&mut self) -> Result<Test, FilterError> {
        const EXPECTED: &str = "`host`, `src`, `dst`, `proto`, `broadcast` or `multicast`";
        let end = match self.next(EXPECTED)? {
            "host" => End::Either,
            "src" => End::Source,
            "dst" => End::Destination,
            "broadcast" => return Ok(Test::Broadcast),
            "multicast" => return Ok(Test::Multicast),
            "proto" => return self.ether_type(),
            _ => {
                self.at -= 1;
                return Err(self.unexpected(EXPECTED));
            }
        };
        // tcpdump also accepts the long form `ether src host MAC`.
        if end != End::Either {
            self.take(&["host"]);
        }
        const ADDRESS: &str = "an Ethernet address such as 52:54:00:12:34:56";
        match self.next(ADDRESS)?.parse::<Mac>() {
            Ok(address) => Ok(Test::Ether(end, address.bytes())),
            Err(_) => {
                self.at -= 1;
                Err(self.unexpected(ADDRESS))
            }
        }
    }

    fn ether_type(&mut self) -> Result<Test, FilterError> {
        const EXPECTED: &str = "an EtherType such as 0x0800";
        let word = self.next(EXPECTED)?;
        let number = match word.strip_prefix("0x") {
            Some(digits) => u16::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        };
        number.map(Test::EtherType).ok_or_else(|| {
            self.at -= 1;
            self.unexpected(EXPECTED)
        })
    }

    /// Parses `host`, `net`, `port` or `portrange` with its value, or an address alone.
    fn of_end(&mut self, end: End) -> Result<Test, FilterError> {
        const EXPECTED: &str = "`host`, `net`, `port`, `portrange` or an address";
        match self.next(EXPECTED)? {
            "host" => self.network(end, false),
            "net" => self.network(end, true),
            "port" => {
                let port = self.number("a port from 0 to 65535")?;
                Ok(Test::Ports(end, port, port))
            }
            "portrange" => {
                const RANGE: &str = "ports such as 80-90";
                let word = self.next(RANGE)?;
                let range = word.split_once('-').and_then(|(first, last)| {
                    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
                    (first <= last).then_some((first, last))
                });
                range
                    .map(|(first, last)| Test::Ports(end, first, last))
                    .ok_or_else(|| {
                        self.at -= 1;
                        self.unexpected(RANGE)
                    })
            }
            _ => {
                self.at -= 1;
                match end {
                    End::Either => Err(self.unexpected(EXPECTED)),
                    _ => self.network(end, false),
                }
            }
        }
    }

    fn network(&mut self, end: End, prefix: bool) -> Result<Test, FilterError> {
        let expected = if prefix {
            "a network such as 10.0.0.0/8 or fd00::/16"
        } else {
            "an address such as 10.0.0.1 or fd00::1"
        };
        let word = self.next(expected)?;
        net(word, prefix)
            .map(|net| Test::Net(end, net))
            .ok_or_else(|| {
                self.at -= 1;
                self.unexpected(expected)
            })
    }

    fn number<T: std::str::FromStr>(&mut self, expected: &'static str) -> Result<T, FilterError> {
        let word = self.next(expected)?;
        word.parse().map_err(|_| {
            self.at -= 1;
            self.unexpected(expected)
        })
    }
}

fn both(first: Test, second: Test) -> Expression {
    Expression::And(
        Box::new(Expression::Test(first)),
        Box::new(Expression::Test(second)),
    )
}

/// Parses an address, or a network if `prefix` is set. Bits of a network's address outside the mask
/// must be zero, as in tcpdump.
fn net(text: &str, prefix: bool) -> Option<Net> {
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) if prefix => (address, Some(bits.parse::<u32>().ok()?)),
        Some(_) => return None,
        None => (text, None),
    };
    match address.parse().ok()? {
        IpAddr::V4(address) => {
            let bits = bits.unwrap_or(32);
            let mask = u32::MAX.checked_shl(32 - bits.min(32)).unwrap_or(0);
            let net = u32::from(address);
            (bits <= 32 && net & !mask == 0).then_some(Net::V4 { net, mask })
        }
        IpAddr::V6(address) => {
            let bits = bits.unwrap_or(128);
            let mask = u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0);
            let net = u128::from(address);
            (bits <= 128 && net & !mask == 0).then_some(Net::V6 { net, mask })
        }
    }
}
