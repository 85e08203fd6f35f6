//! The frontend side of a vhost-user conversation: what a VMM says to a backend for its guest.
//!
//! [`Frontend`] has one method for each message, so that a test can script any order of them, and
//! three that do what a VMM does in whole: [`Frontend::negotiate`], [`Frontend::start`] and
//! [`Frontend::stop`], in the order of QEMU or of cloud-hypervisor. Nothing waits longer than the
//! time-out given at the start. Dropping the frontend disconnects.

mod error;
mod wire;

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

pub use error::AttachError;
pub use wire::WireError;

use crate::memory::SharedMemory;
use crate::virtio::features::unmet;

/// VIRTIO_NET_F_MRG_RXBUF.
pub const MRG_RXBUF: u64 = 1 << 15;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_INDIRECT_DESC.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub const RING_PACKED: u64 = 1 << 34;
/// VIRTIO_F_IN_ORDER.
pub const IN_ORDER: u64 = 1 << 35;

/// VHOST_USER_PROTOCOL_F_MQ.
pub const PROTOCOL_MQ: u64 = 1 << 0;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub const PROTOCOL_REPLY_ACK: u64 = 1 << 3;

/// Features that have a name in messages.
const FEATURE_NAMES: [(u64, &str); 7] = [
    (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF (--mergeable off)"),
    (PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
    (INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
    (EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
    (VERSION_1, "VIRTIO_F_VERSION_1"),
    (RING_PACKED, "VIRTIO_F_RING_PACKED (--ring split)"),
    (IN_ORDER, "VIRTIO_F_IN_ORDER (--in-order off)"),
];

/// How often a socket that refuses is tried again within the time-out.
const RETRY: Duration = Duration::from_millis(50);

/// Whose message order to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Order {
    /// Calls and enables before features, memory and ring addresses.
    #[default]
    Qemu,
    /// Memory and rings first, enables last.
    CloudHypervisor,
}

/// One queue, as a backend must know it.
#[derive(Clone, Copy, Debug)]
pub struct Queue<'a> {
    /// Index: 2n receives, 2n + 1 transmits.
    pub index: u32,
    /// Entries.
    pub size: u16,
    /// User addresses of the three areas.
    pub descriptors: u64,
    /// Available ring or driver area.
    pub available: u64,
    /// Used ring or device area.
    pub used: u64,
    /// Where to start.
    pub base: u32,
    /// Driver to device.
    pub kick: &'a EventFd,
    /// Device to driver.
    pub call: &'a EventFd,
}

/// One region of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub guest_address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address here.
    pub user_address: u64,
    /// Where it starts in the file.
    pub offset: u64,
    /// The file.
    pub fd: RawFd,
}

impl Region {
    /// The whole of `memory`, at `guest_address`.
    pub fn whole(memory: &SharedMemory, guest_address: u64) -> Self {
        Region {
            guest_address,
            len: memory.len() as u64,
            user_address: memory.address() as u64,
            offset: 0,
            fd: memory.file().as_raw_fd(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        words64(&[self.guest_address, self.len, self.user_address, self.offset])
    }
}

fn words64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn words32(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A frontend's end of one vhost-user connection.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    path: PathBuf,
    features: u64,
    protocol: u64,
}

impl Frontend {
    /// Connects to a backend that listens at `path`; one that refuses is tried again until
    /// `timeout`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, AttachError> {
        let deadline = Instant::now() + timeout;
        loop {
            let error = match UnixStream::connect(path) {
                Ok(stream) => return Self::from_stream(stream, path, timeout),
                Err(error) => AttachError::connecting(path, error),
            };
            if !matches!(error, AttachError::Refused(_)) || Instant::now() >= deadline {
                return Err(error);
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Listens at `path` and waits for a backend to connect; the socket is removed afterwards.
    pub fn listen(path: &Path, timeout: Duration) -> Result<Self, AttachError> {
        let failed = |source| AttachError::Socket {
            path: path.to_path_buf(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        let stream = accept(&listener, timeout);
        // Backends look for the file again only to reconnect, which this client does not wait for.
        let _ = fs::remove_file(path);
        match stream.map_err(failed)? {
            Some(stream) => Self::from_stream(stream, path, timeout),
            None => Err(AttachError::NobodyCame {
                path: path.to_path_buf(),
                seconds: timeout.as_secs(),
            }),
        }
    }

    /// Speaks over `stream`; `path` is its name in messages.
    pub fn from_stream(
        stream: UnixStream,
        path: &Path,
        timeout: Duration,
    ) -> Result<Self, AttachError> {
        stream
            .set_read_timeout(Some(timeout))
            .and_then(|()| stream.set_write_timeout(Some(timeout)))
            .map_err(|source| AttachError::Socket {
                path: path.to_path_buf(),
                source,
            })?;
        Ok(Frontend {
            stream,
            path: path.to_path_buf(),
            features: 0,
            protocol: 0,
        })
    }

    /// The connection itself, for bytes that no method sends.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Features acknowledged with SET_FEATURES.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the backend has closed the connection.
    pub fn is_closed(&self) -> bool {
        use rustix::net::{RecvFlags, recv};
        let mut byte = [0u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match recv(&self.stream, &mut byte, flags) {
            Ok((_, length)) => length == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    fn at<T>(&self, result: Result<T, WireError>) -> Result<T, AttachError> {
        result.map_err(|source| AttachError::Wire {
            path: self.path.clone(),
            source,
        })
    }

    /// Sends a request that the backend answers, and returns the answer's body.
    pub fn ask(
        &self,
        request: FrontendReq,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<Vec<u8>, AttachError> {
        self.at(wire::send(&self.stream, request, false, body, fds))?;
        self.at(wire::receive(&self.stream, request))
    }

    /// Sends a request that the backend only acknowledges, where REPLY_ACK was negotiated.
    pub fn tell(
        &self,
        request: FrontendReq,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<(), AttachError> {
        let acknowledged = self.protocol & PROTOCOL_REPLY_ACK != 0;
        self.at(wire::send(&self.stream, request, acknowledged, body, fds))?;
        if !acknowledged {
            return Ok(());
        }
        match self.answered(request)? {
            0 => Ok(()),
            code => self.at(Err(WireError::Refused { request, code })),
        }
    }

    fn answered(&self, request: FrontendReq) -> Result<u64, AttachError> {
        let body = self.at(wire::receive(&self.stream, request))?;
        self.number(request, &body)
    }

    fn number(&self, request: FrontendReq, body: &[u8]) -> Result<u64, AttachError> {
        match <[u8; 8]>::try_from(body) {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => self.at(Err(WireError::NotVhostUser(request))),
        }
    }

    fn ask_number(&self, request: FrontendReq) -> Result<u64, AttachError> {
        let body = self.ask(request, &[], &[])?;
        self.number(request, &body)
    }

    /// SET_OWNER.
    pub fn set_owner(&self) -> Result<(), AttachError> {
        self.tell(FrontendReq::SET_OWNER, &[], &[])
    }

    /// GET_FEATURES.
    pub fn get_features(&self) -> Result<u64, AttachError> {
        self.ask_number(FrontendReq::GET_FEATURES)
    }

    /// SET_FEATURES.
    pub fn set_features(&mut self, features: u64) -> Result<(), AttachError> {
        self.features = features;
        self.tell(FrontendReq::SET_FEATURES, &words64(&[features]), &[])
    }

    /// GET_PROTOCOL_FEATURES.
    pub fn get_protocol_features(&self) -> Result<u64, AttachError> {
        self.ask_number(FrontendReq::GET_PROTOCOL_FEATURES)
    }

    /// SET_PROTOCOL_FEATURES; acknowledgements are asked for from the next message on.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), AttachError> {
        let body = words64(&[features]);
        self.tell(FrontendReq::SET_PROTOCOL_FEATURES, &body, &[])?;
        self.protocol = features;
        Ok(())
    }

    /// GET_QUEUE_NUM.
    pub fn get_queue_num(&self) -> Result<u64, AttachError> {
        self.ask_number(FrontendReq::GET_QUEUE_NUM)
    }

    /// SET_MEM_TABLE.
    pub fn set_mem_table(&self, regions: &[Region]) -> Result<(), AttachError> {
        let mut body = words32(&[regions.len() as u32, 0]);
        let mut fds = Vec::new();
        for region in regions {
            body.extend(region.bytes());
            fds.push(region.fd);
        }
        self.tell(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }

    /// SET_VRING_NUM.
    pub fn set_vring_num(&self, index: u32, size: u32) -> Result<(), AttachError> {
        self.tell(FrontendReq::SET_VRING_NUM, &words32(&[index, size]), &[])
    }

    /// SET_VRING_BASE.
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<(), AttachError> {
        self.tell(FrontendReq::SET_VRING_BASE, &words32(&[index, base]), &[])
    }

    /// GET_VRING_BASE: stops the ring.
    pub fn get_vring_base(&self, index: u32) -> Result<u32, AttachError> {
        let request = FrontendReq::GET_VRING_BASE;
        let body = self.ask(request, &words32(&[index, 0]), &[])?;
        Ok((self.number(request, &body)? >> 32) as u32)
    }

    /// SET_VRING_ADDR, without a log.
    pub fn set_vring_addr(&self, queue: &Queue<'_>) -> Result<(), AttachError> {
        let mut body = words32(&[queue.index, 0]);
        body.extend(words64(&[
            queue.descriptors,
            queue.used,
            queue.available,
            0,
        ]));
        self.tell(FrontendReq::SET_VRING_ADDR, &body, &[])
    }

    /// SET_VRING_KICK.
    pub fn set_vring_kick(&self, index: u32, fd: &EventFd) -> Result<(), AttachError> {
        let body = words64(&[u64::from(index)]);
        self.tell(FrontendReq::SET_VRING_KICK, &body, &[fd.as_raw_fd()])
    }

    /// SET_VRING_CALL.
    pub fn set_vring_call(&self, index: u32, fd: &EventFd) -> Result<(), AttachError> {
        let body = words64(&[u64::from(index)]);
        self.tell(FrontendReq::SET_VRING_CALL, &body, &[fd.as_raw_fd()])
    }

    /// SET_VRING_ERR.
    pub fn set_vring_err(&self, index: u32, fd: &EventFd) -> Result<(), AttachError> {
        let body = words64(&[u64::from(index)]);
        self.tell(FrontendReq::SET_VRING_ERR, &body, &[fd.as_raw_fd()])
    }

    /// SET_VRING_ENABLE.
    pub fn set_vring_enable(&self, index: u32, enable: bool) -> Result<(), AttachError> {
        let body = words32(&[index, u32::from(enable)]);
        self.tell(FrontendReq::SET_VRING_ENABLE, &body, &[])
    }

    /// Everything up to the features, of which none that is offered may lack what it needs: all of
    /// `required` and what the backend has of `optional`; returns what was acknowledged.
    /// SET_FEATURES itself belongs to [`Frontend::start`].
    pub fn negotiate(
        &mut self,
        order: Order,
        required: u64,
        optional: u64,
        queue_pairs: u64,
    ) -> Result<u64, AttachError> {
        if order == Order::CloudHypervisor {
            self.set_owner()?;
        }
        let offered = self.get_features()?;
        // As a guest's driver would, whom the VMM shows what is offered here.
        if let Some(unmet) = unmet(offered) {
            let path = self.path.clone();
            return Err(AttachError::ImpossibleOffer { path, unmet });
        }
        if let Some((_, name)) = FEATURE_NAMES
            .iter()
            .find(|(bit, _)| required & !offered & bit != 0)
        {
            let path = self.path.clone();
            return Err(AttachError::FeatureMissing { path, name });
        }
        if offered & PROTOCOL_FEATURES != 0 {
            let protocol = self.get_protocol_features()?;
            self.set_protocol_features(protocol & (PROTOCOL_MQ | PROTOCOL_REPLY_ACK))?;
            self.check_queues(protocol, queue_pairs)?;
        }
        if order == Order::Qemu {
            self.set_owner()?;
        }
        self.features = (required | optional | PROTOCOL_FEATURES) & offered;
        Ok(self.features)
    }

    fn check_queues(&self, protocol: u64, wanted: u64) -> Result<(), AttachError> {
        let offered = if protocol & PROTOCOL_MQ != 0 {
            self.get_queue_num()?
        } else {
            1
        };
        if offered < wanted {
            return Err(AttachError::TooFewQueues {
                path: self.path.clone(),
                offered,
                wanted,
            });
        }
        Ok(())
    }

    /// Features, memory and rings, in the VMM's order; the rings run afterwards.
    pub fn start(
        &mut self,
        order: Order,
        regions: &[Region],
        queues: &[Queue<'_>],
    ) -> Result<(), AttachError> {
        let can_enable = self.features & PROTOCOL_FEATURES != 0;
        if order == Order::Qemu {
            for queue in queues {
                self.set_vring_call(queue.index, queue.call)?;
            }
        }
        self.set_features(self.features)?;
        self.set_mem_table(regions)?;
        for queue in queues {
            self.start_ring(order, queue)?;
        }
        for queue in queues.iter().filter(|_| can_enable) {
            self.set_vring_enable(queue.index, true)?;
        }
        Ok(())
    }

    fn start_ring(&self, order: Order, queue: &Queue<'_>) -> Result<(), AttachError> {
        let index = queue.index;
        self.set_vring_num(index, u32::from(queue.size))?;
        match order {
            Order::Qemu => {
                self.set_vring_base(index, queue.base)?;
                self.set_vring_addr(queue)?;
                self.set_vring_kick(index, queue.kick)?;
                self.set_vring_call(index, queue.call)
            }
            Order::CloudHypervisor => {
                self.set_vring_addr(queue)?;
                self.set_vring_base(index, queue.base)?;
                self.set_vring_call(index, queue.call)?;
                self.set_vring_kick(index, queue.kick)
            }
        }
    }

    /// Disables and stops the rings; returns their bases.
    pub fn stop(&self, indices: &[u32]) -> Result<Vec<u32>, AttachError> {
        if self.features & PROTOCOL_FEATURES != 0 {
            for &index in indices {
                self.set_vring_enable(index, false)?;
            }
        }
        indices
            .iter()
            .map(|&index| self.get_vring_base(index))
            .collect()
    }
}

/// Waits for one connection.
fn accept(listener: &UnixListener, timeout: Duration) -> io::Result<Option<UnixStream>> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec::try_from(timeout).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(listener, PollFlags::IN)];
    if poll(&mut fds, Some(&limit))? == 0 {
        return Ok(None);
    }
    listener.accept().map(|(stream, _)| Some(stream))
}
