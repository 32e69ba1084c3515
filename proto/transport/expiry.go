package transport

import "time"

// CertificateWarning is how long before its end a certificate is warned of.
const CertificateWarning = 14 * 24 * time.Hour
