//! The NUMA node of memory.

/// Most pages that one call asks about.
pub const MAX_PAGES: usize = 16;

/// Returns the node of the first of these pages that has memory; `None` if none has, and on kernels
/// without NUMA. Touches and moves nothing.
pub fn node_of(pages: &[usize]) -> Option<usize> {
    let count = pages.len().min(MAX_PAGES);
    let mut status = [-1_i32; MAX_PAGES];
    // SAFETY: with no nodes given the call only reports (move_pages(2)). It reads `count`
    // addresses, which it looks up without accessing what they point to, and writes as many
    // statuses; both arrays are that long.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            count,
            pages.as_ptr(),
            std::ptr::null::<libc::c_int>(),
            status.as_mut_ptr(),
            0,
        )
    };
    if result < 0 {
        return None;
    }
    // Errors, such as that a page has never been touched, are negative.
    let known = status[..count].iter();
    known.copied().find_map(|node| usize::try_from(node).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touched_memory_is_on_a_node_and_nothing_is_on_none() {
        let memory = vec![1_u8; 1 << 16];
        let touched = std::hint::black_box(&memory).as_ptr().addr() & !0xfff;
        // Where there is no NUMA there is no answer either.
        if let Some(node) = node_of(&[0, touched + 0x1000]) {
            assert!(node < 1024, "{node}");
        }
        assert_eq!(node_of(&[0x1000]), None);
        assert_eq!(node_of(&[]), None);
    }
}
