// The CPU kernels for one instruction set: AAPE_NAMESPACE, AAPE_VECTOR_BYTES and the compiler's flags say which,
// AAPE_VARIANT and AAPE_TEXT what it is called.

#include "backward.h"
#include "forward.h"
#include "stem_backward.h"
#include "stem_forward.h"

namespace aape {
inline namespace AAPE_NAMESPACE {

// Calls f<T, Quadrature>.
#define AAPE_DISPATCH(f, call)                                   \
  do {                                                           \
    bool wide = (call).x.type == DType::kFloat64;                \
    if (wide && (call).grid.quadrature) f<double, true>(call);   \
    else if (wide) f<double, false>(call);                       \
    else if ((call).grid.quadrature) f<float, true>(call);       \
    else f<float, false>(call);                                  \
  } while (0)

static void sblu(const SbluCall& call) { AAPE_DISPATCH(forward, call); }
static void sblu_backward(const SbluCall& call) { AAPE_DISPATCH(backward, call); }

static void embed(const EmbedCall& call) { AAPE_DISPATCH(stem_forward, call); }
static void embed_backward(const EmbedCall& call) { AAPE_DISPATCH(stem_backward, call); }

}  // namespace AAPE_NAMESPACE

#define AAPE_JOIN(a, b) a##b
#define AAPE_TABLE(name) AAPE_JOIN(k, name)
extern const Kernels AAPE_TABLE(AAPE_VARIANT) = {AAPE_TEXT, sblu, sblu_backward, embed, embed_backward};

}  // namespace aape
