//! The crate's requests, turned into changes of the device state.
//!
//! Only requests of offered features have an effect. The crate refuses most others because their
//! features were not negotiated. The rest is refused here.

use std::fs::File;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result as CrateResult, VhostUserBackendReqHandlerMut};

use super::device::DeviceState;
use super::error::{Request, SessionError};
use super::options::PROTOCOL;
use super::ring::Addresses;
use crate::memory::{MAX_REGIONS, RegionSpec};
use crate::sys::call::CallFd;
use crate::sys::eventfd::KickFd;

impl DeviceState {
    /// Keeps the reason of a refusal, because the crate's error cannot carry it.
    fn told<T>(&mut self, result: Result<T, SessionError>) -> CrateResult<T> {
        result.map_err(|error| {
            self.fail(error);
            Error::InvalidParam
        })
    }

    fn unsupported<T>(&mut self, request: FrontendReq) -> CrateResult<T> {
        self.told(Err(SessionError::Unsupported(Request(request.into()))))
    }

    fn memory_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
    ) -> Result<(), SessionError> {
        let specs = regions
            .iter()
            .zip(files)
            .map(|(region, file)| spec(region, file))
            .collect();
        let memory = self.memory().with_table(specs)?;
        self.set_memory(memory)
    }

    fn set_kick(&mut self, index: u8, file: Option<File>) -> Result<(), SessionError> {
        let ring = self.ring(index.into())?;
        let name = ring.name;
        let kick = file.map(KickFd::new).transpose();
        let kick = kick.map_err(|source| SessionError::Notification { ring: name, source })?;
        ring.kick = kick.map(Into::into);
        ring.kicked = true;
        self.update();
        Ok(())
    }

    fn set_call(&mut self, index: u8, file: Option<File>) -> Result<(), SessionError> {
        let guard = self.sink.calls();
        let ring = self.ring(index.into())?;
        let name = ring.name;
        let call = file.map(|file| CallFd::new(file, guard)).transpose();
        let call = call.map_err(|source| SessionError::Notification { ring: name, source })?;
        ring.call = call.map(Into::into);
        if ring.running.is_some() {
            self.replaced_call(index);
        }
        Ok(())
    }
}

fn spec(region: &VhostUserMemoryRegion, file: File) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        user_addr: region.user_addr,
        size: region.memory_size,
        offset: region.mmap_offset,
        file,
    }
}

impl VhostUserBackendReqHandlerMut for DeviceState {
    // A backend without INFLIGHT or a second connection has no use for ownership. SET_OWNER and
    // RESET_OWNER are accepted at any time and do nothing, as the specification recommends for
    // RESET_OWNER.
    fn set_owner(&mut self) -> CrateResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> CrateResult<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> CrateResult<()> {
        let result = self.reset();
        self.told(result)
    }

    fn get_features(&mut self) -> CrateResult<u64> {
        self.features_read = true;
        Ok(self.options.offered())
    }

    fn set_features(&mut self, features: u64) -> CrateResult<()> {
        let result = DeviceState::set_features(self, features);
        self.told(result)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> CrateResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let result = self.memory_table(regions, files);
        self.told(result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> CrateResult<()> {
        let result = self.set_size(index, num);
        self.told(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        // No dirty log is offered, so there is nothing to log to.
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> CrateResult<()> {
        let result = self.set_addresses(
            index,
            Addresses {
                descriptors,
                available,
                used,
            },
        );
        self.told(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> CrateResult<()> {
        let result = self.set_base(index, base);
        self.told(result)
    }

    fn get_vring_base(&mut self, index: u32) -> CrateResult<VhostUserVringState> {
        let result = self.stop_ring(index);
        self.told(result)
            .map(|base| VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> CrateResult<()> {
        let result = self.set_kick(index, file);
        self.told(result)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> CrateResult<()> {
        let result = self.set_call(index, file);
        self.told(result)
    }

    /// The descriptor is closed. A frontend could make a write to it block, and frontends only log
    /// the errors that come through it.
    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> CrateResult<()> {
        let result = self.ring(index.into()).map(|_| ());
        self.told(result)
    }

    fn get_protocol_features(&mut self) -> CrateResult<VhostUserProtocolFeatures> {
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> CrateResult<()> {
        let result = self.set_protocol(features);
        self.told(result)
    }

    fn get_queue_num(&mut self) -> CrateResult<u64> {
        self.queues_asked = true;
        Ok(self.options.queue_num().into())
    }

    /// Not reached: the session handles this message itself.
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> CrateResult<()> {
        let result = self.enable(index, enable.into());
        self.told(result)
    }

    fn get_max_mem_slots(&mut self) -> CrateResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> CrateResult<Option<VhostUserMemoryRegionBase>> {
        let memory = self.memory().with_region(spec(region, file));
        let result = memory
            .map_err(SessionError::from)
            .and_then(|memory| self.set_memory(memory));
        self.told(result).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> CrateResult<()> {
        let (guest, user, size) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let memory = self.memory().without_region(guest, user, size);
        let result = memory
            .map_err(SessionError::from)
            .and_then(|memory| self.set_memory(memory));
        self.told(result)
    }

    fn get_config(
        &mut self,
        _offset: u32,
        _size: u32,
        _flags: VhostUserConfigFlags,
    ) -> CrateResult<Vec<u8>> {
        self.unsupported(FrontendReq::GET_CONFIG)
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> CrateResult<()> {
        self.unsupported(FrontendReq::SET_CONFIG)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> CrateResult<()> {
        self.unsupported(FrontendReq::GPU_SET_SOCKET)
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> CrateResult<File> {
        self.unsupported(FrontendReq::GET_SHARED_OBJECT)
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> CrateResult<(VhostUserInflight, File)> {
        self.unsupported(FrontendReq::GET_INFLIGHT_FD)
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> CrateResult<()> {
        self.unsupported(FrontendReq::SET_INFLIGHT_FD)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> CrateResult<Option<File>> {
        self.unsupported(FrontendReq::SET_DEVICE_STATE_FD)
    }

    fn check_device_state(&mut self) -> CrateResult<()> {
        self.unsupported(FrontendReq::CHECK_DEVICE_STATE)
    }

    fn get_shmem_config(&mut self) -> CrateResult<VhostUserShMemConfig> {
        self.unsupported(FrontendReq::GET_SHMEM_CONFIG)
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> CrateResult<()> {
        self.unsupported(FrontendReq::SET_LOG_BASE)
    }
}
