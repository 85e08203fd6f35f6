//! Filter expressions: a part of tcpdump's language, compiled when the observer is made.
//!
//! No well-kept library compiles tcpdump's language without libpcap. So this module compiles the
//! part that operators use most (`docs/observers.md` lists it). An expression becomes a list of
//! steps. Each step has a test, and the next step for either result. The next step always has a
//! lower number, so a frame takes at most as many tests as there are steps. A filter looks at the
//! private copy of a frame's first bytes and allocates nothing.

mod headers;
mod parse;

use std::net::{Ipv4Addr, Ipv6Addr};

use headers::{Headers, Network};
pub use parse::FilterError;

/// Whether a test looks at the source, the destination, or either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Source,
    Destination,
    Either,
}

impl End {
    fn holds(self, source: bool, destination: bool) -> bool {
        match self {
            End::Source => source,
            End::Destination => destination,
            End::Either => source || destination,
        }
    }
}

/// A range of addresses: an address, and a mask of the bits that must be equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Net {
    V4 { net: u32, mask: u32 },
    V6 { net: u128, mask: u128 },
}

/// One question to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Ip,
    Ip6,
    Arp,
    /// IPv4 or IPv6 with this protocol.
    Protocol(u8),
    /// A VLAN tag. With `Some`: a tag with this identifier.
    Vlan(Option<u16>),
    EtherType(u16),
    Ether(End, [u8; 6]),
    Broadcast,
    Multicast,
    Net(End, Net),
    /// TCP, UDP or SCTP ports from the first to the last.
    Ports(End, u16, u16),
    /// A frame of at most so many bytes.
    Less(u32),
    /// A frame of at least so many bytes.
    Greater(u32),
}

/// Numbers of steps that end the walk: the frame is accepted or refused.
const ACCEPT: u16 = u16::MAX;
const REJECT: u16 = u16::MAX - 1;

#[derive(Clone, Copy, Debug)]
struct Step {
    test: Test,
    yes: u16,
    no: u16,
}

/// A compiled expression.
#[derive(Clone, Debug)]
pub struct Filter {
    text: String,
    steps: Box<[Step]>,
    first: u16,
}

impl Default for Filter {
    /// A filter that accepts every frame.
    fn default() -> Self {
        Filter {
            text: String::new(),
            steps: Box::default(),
            first: ACCEPT,
        }
    }
}

impl Filter {
    /// Compiles an expression. An expression without words accepts every frame.
    pub fn compile(text: &str) -> Result<Filter, FilterError> {
        let Some(expression) = parse::parse(text)? else {
            return Ok(Filter::default());
        };
        let mut steps = Vec::new();
        let first = emit(&expression, ACCEPT, REJECT, &mut steps);
        Ok(Filter {
            text: text.trim().to_string(),
            steps: steps.into(),
            first,
        })
    }

    /// Returns the expression as it was given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the filter accepts a frame of `len` bytes that begins with `head`.
    #[inline]
    pub fn accepts(&self, head: &[u8], len: u32) -> bool {
        self.first == ACCEPT || self.run(head, len)
    }

    fn run(&self, head: &[u8], len: u32) -> bool {
        let headers = Headers::read(head);
        let mut at = self.first;
        while let Some(step) = self.steps.get(usize::from(at)) {
            at = if holds(step.test, &headers, len) {
                step.yes
            } else {
                step.no
            };
        }
        at == ACCEPT
    }
}

/// Appends the steps of `expression`, which lead to `yes` or `no`. Returns the number of the first
/// step to take.
fn emit(expression: &parse::Expression, yes: u16, no: u16, steps: &mut Vec<Step>) -> u16 {
    match expression {
        parse::Expression::Test(test) => {
            steps.push(Step {
                test: *test,
                yes,
                no,
            });
            // At most MAX_FILTER tests.
            (steps.len() - 1) as u16
        }
        parse::Expression::Not(inner) => emit(inner, no, yes, steps),
        parse::Expression::And(first, second) => {
            let second = emit(second, yes, no, steps);
            emit(first, second, no, steps)
        }
        parse::Expression::Or(first, second) => {
            let second = emit(second, yes, no, steps);
            emit(first, yes, second, steps)
        }
    }
}

fn holds(test: Test, headers: &Headers, len: u32) -> bool {
    match test {
        Test::Ip => matches!(headers.network, Network::V4 { .. }),
        Test::Ip6 => matches!(headers.network, Network::V6 { .. }),
        Test::Arp => headers.ether_type == Some(headers::ARP),
        Test::Protocol(number) => headers.protocol == Some(number),
        Test::Vlan(wanted) => match (headers.vlan, wanted) {
            (Some(vlan), Some(wanted)) => vlan == wanted,
            (vlan, _) => vlan.is_some(),
        },
        Test::EtherType(wanted) => headers.ether_type == Some(wanted),
        Test::Ether(end, address) => {
            let is = |found: Option<[u8; 6]>| found == Some(address);
            end.holds(is(headers.source), is(headers.destination))
        }
        Test::Broadcast => headers.destination == Some([0xff; 6]),
        Test::Multicast => headers.destination.is_some_and(|to| to[0] & 1 == 1),
        Test::Net(end, net) => match (headers.network, net) {
            (
                Network::V4 {
                    source,
                    destination,
                }
                | Network::Arp {
                    source,
                    destination,
                },
                Net::V4 { net, mask },
            ) => {
                let inside = |address: [u8; 4]| u32::from(Ipv4Addr::from(address)) & mask == net;
                end.holds(inside(source), inside(destination))
            }
            (
                Network::V6 {
                    source,
                    destination,
                },
                Net::V6 { net, mask },
            ) => {
                let inside = |address: [u8; 16]| u128::from(Ipv6Addr::from(address)) & mask == net;
                end.holds(inside(source), inside(destination))
            }
            _ => false,
        },
        Test::Ports(end, first, last) => headers.ports.is_some_and(|(source, destination)| {
            let inside = |port: u16| (first..=last).contains(&port);
            end.holds(inside(source), inside(destination))
        }),
        Test::Less(most) => len <= most,
        Test::Greater(least) => len >= least,
    }
}

#[cfg(test)]
mod tests;
